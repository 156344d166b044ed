"""Size and sha256 of every file of a folder, stored in the folder and compared before its files are used."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from vixml_jax.errors import InputError
from vixml_jax.files import (
  fingerprint_of,
  locked,
  new_folder,
  read_json_object,
  remove_folder,
  sha256_of_file,
  sync_file,
  sync_folders,
  write_json,
)
from vixml_jax.stages import stage

MANIFEST = "sha256.json"
"""Name of the file with the sizes and hashes of the others."""
FileHashes = dict[str, dict[str, Any]]
"""`size` in bytes and `sha256` of each file, by its path within the folder."""

# Hashing releases Python's lock, and a file is hashed by one thread.
_THREADS = min(16, os.cpu_count() or 1)
# Hashing more than this takes long enough to be of interest.
_LONG_BYTES = 2**30

_log = logging.getLogger(__name__)


class Damage(NamedTuple):
  """A file that differs from what was written.

  Attributes:
    name: Path of the file within its folder.
    reason: What is wrong with it.
  """

  name: str
  reason: str


def describe_file(path: Path) -> dict[str, Any]:
  """Returns `size` and `sha256` of a file, after it has reached the disk."""
  sync_file(path)
  return {"size": path.stat().st_size, "sha256": sha256_of_file(path)}


def describe_files(folder: Path, describe: Callable[[str, Path], dict[str, Any]] | None = None) -> FileHashes:
  """Returns size and sha256 of all files of a folder, after they and their folders have reached the disk.

  Args:
    folder: The folder.
    describe: Function of the name and path of a file that returns its entry; None reads the file.
  """
  paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
  paths.pop(MANIFEST, None)
  describe = describe or (lambda name, path: describe_file(path))
  with ThreadPoolExecutor(_THREADS) as threads:
    entries = list(threads.map(describe, paths, paths.values()))
  sync_folders(folder)
  return dict(zip(paths, entries, strict=True))


def write_manifest(folder: Path) -> None:
  """Writes the manifest of a folder, after all other files have reached the disk."""
  write_hashes(folder / MANIFEST, describe_files(folder))


def write_hashes(path: Path, files: FileHashes) -> None:
  """Writes sizes and hashes of files to a file that has its own hash."""
  write_json(path, {"files": files, "sha256": fingerprint_of(files)})


def read_manifest(folder: Path) -> FileHashes:
  """Returns the contents of a folder's manifest; see `read_hashes`."""
  return read_hashes(folder / MANIFEST)


def read_hashes(path: Path) -> FileHashes:
  """Returns what `write_hashes` has written.

  Raises:
    InputError: The file is missing or damaged. The message has no advice.
  """
  cause = "without it, no other file can be checked"
  value = read_json_object(path, absent=cause, damaged=cause)
  if set(value) != {"files", "sha256"} or fingerprint_of(value["files"]) != value["sha256"]:
    raise InputError(f"{path}: is damaged (its sha256 differs from its contents)")
  return value["files"]


def find_damage(folder: Path, files: FileHashes, *, contents: bool) -> Damage | None:
  """Compares files with their manifest and returns the first one that is missing or differs; None if all are whole.

  Args:
    folder: The folder.
    files: Size and sha256 of each file to compare.
    contents: Whether to read every file and compare its sha256; otherwise only sizes are compared.
  """
  for name, expected in files.items():
    try:
      size = (folder / name).stat().st_size
    except OSError as error:
      return Damage(name, f"cannot be read: {error.strerror}")
    if size != expected["size"]:
      return Damage(name, f"has {size:,} bytes instead of {expected['size']:,}")
  if not contents:
    return None
  total = sum(expected["size"] for expected in files.values())
  with (
    stage(f"compare {total / 2**30:.1f} GiB of {folder} with their sha256", logged=total >= _LONG_BYTES),
    ThreadPoolExecutor(_THREADS) as threads,
  ):
    found = threads.map(lambda name: _wrong_content(folder / name, files[name]["sha256"]), files)
    return next((Damage(name, reason) for name, reason in zip(files, found, strict=True) if reason), None)


def _wrong_content(path: Path, expected: str) -> str | None:
  try:
    return None if sha256_of_file(path) == expected else "its sha256 differs from that of the file that was written"
  except OSError as error:
    return f"cannot be read: {error.strerror}"


def check_folder(
  folder: Path, remedy: str, *, contents: bool, and_contents_of: Callable[[str], bool] = lambda name: False
) -> None:
  """Compares the files of a folder with its manifest.

  Args:
    folder: The folder.
    remedy: What to do about damage, as the end of the error message.
    contents: Whether to read every file and compare its sha256; otherwise only sizes are compared.
    and_contents_of: Returns whether the contents of a file are compared anyway.

  Raises:
    InputError: The manifest or a file is missing or damaged; the message names it.
  """
  try:
    files = read_manifest(folder)
  except InputError as error:
    raise InputError(f"{error}; {remedy}") from error
  chosen = {name: entry for name, entry in files.items() if contents or and_contents_of(name)}
  damage = find_damage(folder, files, contents=False) or find_damage(folder, chosen, contents=True)
  if damage:
    raise InputError(f"{folder / damage.name}: is damaged ({damage.reason}); {remedy}")


def cached_folder(folder: Path, write: Callable[[Path], None]) -> None:
  """Makes a folder that can be made again: where it does not exist yet, and where one of its files is damaged.

  All files are read and compared with their sha256 each time. One process of this machine writes at a time.

  Args:
    folder: The folder.
    write: Writes the files into the folder that it receives.
  """
  if folder.is_dir() and _cache_damage(folder) is None:
    return
  with locked(f"{folder}.lock"):
    if folder.is_dir():
      damage = _cache_damage(folder)  # Another process may have replaced it meanwhile.
      if damage is None:
        return
      _log.warning("%s; the folder is written again", damage)
      remove_folder(folder)
    with new_folder(folder) as work:
      write(work)
      write_manifest(work)


def _cache_damage(folder: Path) -> str | None:
  try:
    check_folder(folder, "it is a cache", contents=True)
  except InputError as error:
    return str(error)
  return None
