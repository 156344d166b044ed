"""Folders and files that appear whole or not at all; folders are built once, by one process at a time."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import Any

from vixml_jax.errors import InputError

_CHUNK_BYTES = 1 << 20


def fingerprint_of(made_of: Any) -> str:
  """sha256 in hex of a JSON value: what a folder's contents are made of."""
  return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: str | os.PathLike[str], advance: Callable[[int], object] = lambda size: None) -> str:
  """Returns the sha256 of a file in hex, read in chunks.

  Args:
    path: the file.
    advance: called with the number of bytes of every chunk, for a progress bar.

  Raises:
    OSError: the file cannot be read.
  """
  digest = hashlib.sha256()
  with Path(path).open("rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      digest.update(chunk)
      advance(len(chunk))
  return digest.hexdigest()


def read_json_object(path: Path, absent: str, damaged: str) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Args:
    path: the file.
    absent: what the user should do where the file cannot be opened; the end of the error's message.
    damaged: what the user should do where it is not a JSON object.

  Raises:
    InputError: naming the file, what is wrong with it and what to do.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); {absent}") from error
  except ValueError as error:
    raise InputError(f"{path}: is not JSON ({error}); {damaged}") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: is not a JSON object; {damaged}")
  return value


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
  """Lets one process of this machine at a time in; the lock dies with its process.

  Args:
    path: lock file, made with its folder when missing.

  Raises:
    InputError: the folder cannot be made or written to.
  """
  path = Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
  except OSError as error:
    raise InputError(f"{path.parent}: cannot be written to ({error.strerror}); choose another folder") from error
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
  """Gives an empty folder that becomes `target` when the block ends without an exception.

  Call it under `locked`: what a killed process left behind is removed.
  """
  target = Path(target)
  work = target.with_name(f"{target.name}.incomplete")
  shutil.rmtree(work, ignore_errors=True)
  work.mkdir(parents=True)
  try:
    yield work
    work.rename(target)
  finally:
    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def new_file(target: str | os.PathLike) -> Iterator[Path]:
  """Gives the path of a file to write, which replaces `target` when the block ends without an exception."""
  target = Path(target)
  work = target.with_name(f"{target.name}.incomplete")
  try:
    yield work
    work.replace(target)
  finally:
    work.unlink(missing_ok=True)


def write_json(target: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file, indented, whole or not at all."""
  with new_file(target) as work:
    work.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
