"""Says in a bucket which process uses a workdir, so that two never write it at once.

A lock in a bucket would not end with its process. The process renews an object instead. Another one that finds the
object waits for longer than that: if it is renewed meanwhile, the workdir is in use, and otherwise its process was
killed. A process that was cut off from the bucket for so long finds the object of its successor, and stops.
"""

import datetime
import json
import logging
import os
import socket
import threading
import time
from typing import Any
import uuid

from vixml_jax.errors import InputError
from vixml_jax.remote import Bucket

NAME = "used_by.json"
"""Name of the object in the workdir."""
RENEW_SECONDS = 20.0
WAIT_SECONDS = 90.0

_log = logging.getLogger(__name__)


class MustStop(InputError):
  """This process must write nothing more to the workdir: another one uses it now, or its local copy was deleted."""


class BucketUse:
  """The use of a workdir in a bucket by this process, from `begin` to `end`.

  Args:
    bucket: The workdir.
    cache: Id of the local copy of the workdir, which only one process uses at a time.
  """

  def __init__(self, bucket: Bucket, cache: str):
    self._bucket, self._cache, self._token = bucket, cache, uuid.uuid4().hex
    self._since = _now()
    self._ended = threading.Event()
    self._renewing = threading.Thread(target=self._renew, name="bucket use", daemon=True)

  def is_last(self) -> bool:
    """Returns whether no other local copy was used for the workdir since this one was."""
    return self._read().get("cache") == self._cache

  def wait(self) -> None:
    """Returns when no other process uses the workdir.

    Raises:
      InputError: Another process does.
    """
    found = self._read()
    if not found or found.get("ended") or found.get("cache") == self._cache:
      return
    who = f"process {found.get('process')} of {found.get('host')}, since {found.get('since')}"
    _log.warning(
      "%s: was in use by %s, which did not end by itself; waiting up to %d s to see whether it still is",
      self._bucket.url,
      who,
      WAIT_SECONDS,
    )
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
      time.sleep(min(5.0, WAIT_SECONDS / 10))
      now = self._read()
      if not now or now.get("ended"):
        return
      if now != found:
        raise InputError(f"{self._bucket.url}: is in use by {who}; wait for its end, or use another --workdir")

  def begin(self) -> None:
    """Writes the object, which shows that the bucket can be written, and keeps it renewed.

    Raises:
      InputError: The bucket cannot be written.
    """
    self._write()
    self._renewing.start()

  def check(self) -> None:
    """Checks that this process still is the one that uses the workdir.

    Raises:
      MustStop: Another process does, since this one could not renew the object for long.
      InputError: The bucket cannot be reached.
    """
    found = self._read()
    if found.get("token") not in (None, self._token):
      raise MustStop(
        f"{self._bucket.url}: process {found.get('process')} of {found.get('host')} uses it since "
        f"{found.get('since')}, so this process writes nothing more to it; let one of them run"
      )

  def end(self, *, forget: bool = False) -> None:
    """Ends the use; a bucket that cannot be reached is ignored.

    Args:
      forget: Whether to remove the object, since nothing else is in the workdir.
    """
    self._ended.set()
    if self._renewing.is_alive():
      self._renewing.join(RENEW_SECONDS)
    try:
      self.check()
      if forget:
        self._bucket.remove(NAME)
      else:
        self._write(ended=True)
    except InputError as error:
      _log.debug("%s", error)

  def _renew(self) -> None:
    while not self._ended.wait(RENEW_SECONDS):
      try:
        self.check()
        self._write()
      except MustStop:
        return  # The next upload says so.
      except InputError as error:
        _log.debug("%s", error)

  def _read(self) -> dict[str, Any]:
    if self._bucket.size(NAME) is None:
      return {}
    try:
      found = json.loads(self._bucket.read(NAME))
    except json.JSONDecodeError:
      return {}
    return found if isinstance(found, dict) else {}

  def _write(self, *, ended: bool = False) -> None:
    value = {
      "cache": self._cache,
      "token": self._token,
      "host": socket.gethostname(),
      "process": os.getpid(),
      "since": self._since,
      "renewed": _now(),
      "ended": ended,
    }
    self._bucket.write(NAME, (json.dumps(value, indent=2) + "\n").encode())


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat()
