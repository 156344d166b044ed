"""Writes files and folders as a whole or not at all, by one process at a time; hashes and checks files."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import IO, Any

from vixml_jax.errors import InputError

_CHUNK_BYTES = 1 << 20


def fingerprint_of(value: Any) -> str:
  """Returns the sha256 in hex of a JSON value, such as a description of the contents of a folder.

  >>> fingerprint_of({"b": 1, "a": 2}) == fingerprint_of({"a": 2, "b": 1})
  True
  """
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: str | os.PathLike[str], advance: Callable[[int], object] = lambda size: None) -> str:
  """Returns the sha256 of a file in hex, read in chunks.

  Args:
    path: Path of the file.
    advance: Called with the number of bytes of every chunk, for a progress bar.

  Raises:
    OSError: The file cannot be read.
  """
  with Path(path).open("rb") as file:
    return sha256_of_stream(file, advance)


def sha256_of_stream(file: IO[bytes], advance: Callable[[int], object] = lambda size: None) -> str:
  """Returns the sha256 of the rest of an open file in hex, read in chunks; see `sha256_of_file`."""
  digest = hashlib.sha256()
  while chunk := file.read(_CHUNK_BYTES):
    digest.update(chunk)
    advance(len(chunk))
  return digest.hexdigest()


def read_json_object(path: Path, absent: str, damaged: str) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Args:
    path: Path of the file.
    absent: Advice if the file cannot be opened; it ends the error message.
    damaged: Advice if the file does not have a JSON object; it ends the error message.

  Raises:
    InputError: The file cannot be opened, or does not have a JSON object.
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


def write_json(target: str | os.PathLike[str], value: Any) -> None:
  """Writes an indented JSON file as a whole or not at all."""
  with new_file(target) as work:
    work.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_file(target: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields the path of a file to write, which replaces `target` if the block ends without an exception."""
  target = Path(target)
  work = target.with_name(f"{target.name}.incomplete")
  try:
    yield work
    work.replace(target)
  finally:
    work.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields an empty folder, which becomes `target` if the block ends without an exception.

  The caller must hold the lock of `locked`, since leftovers of a killed process are removed.
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
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
  """Runs the block in one process of this machine at a time. The lock ends when its process ends.

  Args:
    path: Path of the lock file, which is created with its folder if it does not exist.

  Raises:
    InputError: The folder cannot be created, or the file cannot be written.
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
