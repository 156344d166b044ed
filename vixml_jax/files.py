"""Writes files and folders as a whole or not at all, also across a power cut; locks, hashes and checks files."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
import re
import shutil
from typing import IO, Any
import unicodedata

from vixml_jax.errors import InputError
from vixml_jax.record_files import JSON, json_fault

_CHUNK_BYTES = 1 << 20
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_MOST_BYTES = 2000  # Of a path. Linux accepts 4,095, and the names of files are appended.
_MOST_BYTES_OF_A_NAME = 255
_SHORT_WRITE = re.compile(r"^\d+ requested and \d+ written$")


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
    value = JSON.decode(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); {absent}") from error
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}: is not JSON ({json_fault(error)}); {damaged}") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: is not a JSON object; {damaged}")
  return value


def write_json(target: str | os.PathLike[str], value: Any) -> None:
  """Writes an indented JSON file as a whole or not at all."""
  with new_file(target) as work:
    work.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sync_file(path: str | os.PathLike[str]) -> None:
  """Waits until the contents of a file are on the disk."""
  _sync(path, os.O_RDONLY)


def sync_folder(path: str | os.PathLike[str]) -> None:
  """Waits until the names in a folder are on the disk: files that were created, renamed or removed."""
  try:
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some network file systems cannot.
      raise


def sync_folders(path: Path) -> None:
  """Does the same for a folder and all folders in it."""
  for folder in (*(inner for inner in path.rglob("*") if inner.is_dir()), path):
    sync_folder(folder)


def make_folder(path: Path) -> None:
  """Makes a folder and those above it where they are missing; they survive a power cut.

  Raises:
    OSError: A folder cannot be made.
  """
  missing = [folder for folder in (path, *path.parents) if not folder.exists()]
  path.mkdir(parents=True, exist_ok=True)
  for folder in missing:
    sync_folder(folder.parent)


def _sync(path: str | os.PathLike[str], flags: int) -> None:
  descriptor = os.open(path, flags)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def new_file(target: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields the path of a file to write, which replaces `target` if the block ends without an exception.

  After a kill or a power cut, the target is the old file or the new one. After the block, it is the new one.

  Raises:
    InputError: The disk is full or fails (`writing`).
  """
  target = Path(target)
  work = target.with_name(f"{target.name}.incomplete")
  try:
    with writing(target):
      yield work
      sync_file(work)
      work.replace(target)
      sync_folder(target.parent)
  finally:
    with contextlib.suppress(OSError):
      work.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields an empty folder, which becomes `target` if the block ends without an exception.

  After a kill or a power cut, the target is absent or complete. The caller must hold the lock of `locked`, since
  leftovers of a killed process are removed.

  Raises:
    InputError: The disk is full or fails (`writing`).
  """
  target = Path(target)
  work = target.with_name(f"{target.name}.incomplete")
  try:
    with writing(target):
      shutil.rmtree(work, ignore_errors=True)
      make_folder(work)
      yield work
      for path in work.rglob("*"):
        if path.is_file():
          sync_file(path)
      sync_folders(work)
      work.rename(target)
      sync_folder(target.parent)
  finally:
    shutil.rmtree(work, ignore_errors=True)


def remove_folder(path: Path) -> None:
  """Removes a folder if it exists. It first gets another name, so that no process finds a part of it.

  Raises:
    InputError: The disk fails (`writing`).
  """
  leftover = path.with_name(f"{path.name}.removed.incomplete")
  shutil.rmtree(leftover, ignore_errors=True)
  with writing(path), contextlib.suppress(FileNotFoundError):
    path.rename(leftover)
  shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def writing(target: str | os.PathLike[str]) -> Iterator[None]:
  """Raises an error that names `target` if the disk is full or fails while the block writes it.

  Raises:
    InputError: The disk is full, a quota is used up, or the disk fails.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    reason = disk_fault(error)
    if reason is None:
      raise
    raise InputError(
      f"{target}: cannot be written ({reason}); nothing that was stored before is lost: make room on its disk, and "
      "start the same command again"
    ) from error


def disk_fault(error: Exception) -> str | None:
  """Returns what is wrong with the disk; None if the error has another cause.

  Libraries raise errors of their own whose message ends with that of the operating system. numpy's has neither number
  nor message.
  """
  if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
    return os.strerror(error.errno)
  if isinstance(error, OSError) and _SHORT_WRITE.search(str(error)):
    return os.strerror(errno.ENOSPC)
  return next((name for name in map(os.strerror, _DISK_FAULTS) if name in str(error)), None)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], busy: str | None = None) -> Iterator[None]:
  """Runs the block in one process of this machine at a time. The lock ends when its process ends.

  Args:
    path: Path of the lock file, which is created with its folder if it does not exist.
    busy: Error message if another process holds the lock; None to wait for it.

  Raises:
    InputError: The folder cannot be created, the file cannot be written, or another process holds the lock.
  """
  path = Path(path)
  try:
    make_folder(path.parent)
    file = path.open("w")
  except OSError as error:
    raise InputError(f"{path.parent}: cannot be written to ({error.strerror}); choose another folder") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
    except BlockingIOError as error:
      raise InputError(f"{busy}") from error
    yield


def path_problem(text: str) -> str | None:
  """Returns why a text cannot be a path; None if it can.

  >>> path_problem("runs/quickstart")
  >>> path_problem("runs/" + 300 * "a")
  'a name in it has 300 bytes, and file systems accept 255'
  >>> path_problem("~/runs")
  'it starts with ~, which is not replaced by a home folder here: write the home folder in full'
  """
  if text.startswith("~"):
    return "it starts with ~, which is not replaced by a home folder here: write the home folder in full"
  if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
    return "it has characters that cannot be printed, such as NUL, or halves of characters"
  length = len(text.encode())
  if length > _MOST_BYTES:
    return f"it has {length:,} bytes, and at most {_MOST_BYTES:,} are accepted"
  longest = max(len(name.encode()) for name in text.split("/"))
  if longest > _MOST_BYTES_OF_A_NAME:
    return f"a name in it has {longest} bytes, and file systems accept {_MOST_BYTES_OF_A_NAME}"
  return None
