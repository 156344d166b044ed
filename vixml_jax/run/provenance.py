"""The provenance of a run: what each of its starts computed with, in `provenance.json` of the workdir."""

from collections.abc import Iterator, Mapping, Sequence
import datetime
import logging
from pathlib import Path
import re
import shlex
import sys
from typing import Any

import jax

from vixml_jax.errors import InputError
from vixml_jax.files import read_json_object, write_json, writing
from vixml_jax.run.environment import describe_environment
from vixml_jax.run.workdir import PROVENANCE

_HASHES = ("data_fingerprint", "weights_sha256", "adapter_sha256")  # Keys of a checkpoint's JSON part.
_TIMES = ("first", "last", "times")
_LONGEST = 1000  # Characters of a word of the command, such as a program after -c.
_SECRETS = {"key", "keys", "apikey", "token", "secret", "password", "passwd", "pwd", "credential", "credentials"}
_HIDDEN = "***"
_LOGIN_IN_URL = re.compile(r"(://)[^/\s@]+@")
_SECRET_IN_URL = re.compile(rf"([?&][^=&\s]*(?:{'|'.join(sorted(_SECRETS))}|sig|signature)[^=&\s]*=)[^&\s]+", re.I)

_log = logging.getLogger(__name__)


def record_start(workdir: Path, meta: Mapping[str, Any]) -> None:
  """Adds the start of this process to the provenance of a run; only the first process writes.

  Starts that follow each other and differ in their times only are one entry, so that the file does not grow with each
  preemption.

  Args:
    workdir: Folder of the run.
    meta: JSON part of the checkpoint, which has the hashes of the data and of the pretrained weights.

  Raises:
    InputError: The disk is full or fails.
  """
  if jax.process_index():
    return
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  start = {
    "command": command_line(),
    **{name: meta[name] for name in _HASHES if name in meta},
    "environment": describe_environment(),
  }
  try:
    starts = read_starts(workdir)
  except InputError as error:
    _log.warning("%s", error)
    starts = []
  if starts and {key: value for key, value in starts[-1].items() if key not in _TIMES} == start:
    starts[-1] |= {"last": now, "times": starts[-1]["times"] + 1}
  else:
    starts.append({"first": now, "last": now, "times": 1} | start)
  with writing(workdir / PROVENANCE):
    write_json(workdir / PROVENANCE, {"starts": starts})


def read_starts(workdir: Path) -> list[dict[str, Any]]:
  """Returns the entries of a workdir's provenance in the order of time.

  Each has `first` and `last`, the times of the first and the last such start in UTC; `times`, their number; `command`;
  the hashes of the data and of the weights; and `environment` (`environment.describe_environment`).

  Returns:
    Nothing if the workdir has no provenance: it was made by an earlier version, or by `Model.save`.

  Raises:
    InputError: The file is damaged.
  """
  path = workdir / PROVENANCE
  if not path.exists():
    return []
  found = read_json_object(path, absent="check its permissions", damaged="it begins anew; delete it")
  starts = found.get("starts")
  wanted = {*_TIMES, "command", "environment"}
  if not isinstance(starts, list) or not all(isinstance(start, dict) and wanted <= start.keys() for start in starts):
    raise InputError(f"{path}: has no list of starts; delete it")
  return starts


def provenance_lines(start: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields name and value of each line that describes an entry of `read_starts`."""
  yield "command", start["command"]
  again = "" if start["times"] == 1 else f", {start['times']} times until {start['last']}"
  yield "started", start["first"] + again
  yield "data", start.get("data_fingerprint", "unknown")
  for name, hashes in (("weights", start.get("weights_sha256")), ("adapter", start.get("adapter_sha256"))):
    if hashes:
      yield name, ", ".join(f"{file} {sha256}" for file, sha256 in hashes.items())
  for name, value in start["environment"].items():
    if value:
      yield name, ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else str(value)


def command_line(words: Sequence[str] | None = None) -> str:
  """Returns a command as a shell takes it, without secrets.

  The values of flags whose name says key, token, secret, password or credential are replaced by ***, as are logins and
  such parameters in addresses.

  Args:
    words: The program and its arguments; None for the command of this process.

  >>> command_line(["vixml", "train", "--config.track.api_key=abc", "--config.track.mlflow_uri=https://me:pw@host/x"])
  "vixml train '--config.track.api_key=***' '--config.track.mlflow_uri=https://***@host/x'"
  """
  shown, hide = [], False
  for word in sys.orig_argv if words is None else words:
    name, given, _ = word.partition("=")
    secret = word.startswith("-") and not _SECRETS.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))
    if hide and not word.startswith("-"):
      word = _HIDDEN
    elif secret and given:
      word = f"{name}={_HIDDEN}"
    hide = secret and not given
    word = _SECRET_IN_URL.sub(rf"\1{_HIDDEN}", _LOGIN_IN_URL.sub(rf"\1{_HIDDEN}@", word))
    shown.append(word if len(word) <= _LONGEST else word[:_LONGEST] + "...")
  return shlex.join(shown)
