"""A folder whose contents are replaced as a whole: it holds numbered snapshots, of which the file CURRENT names one.

CURRENT always names a complete snapshot, even if a process is killed or the power fails at any time: the next snapshot
is written in full and reaches the disk, then CURRENT is replaced in one step, and only when that has reached the disk
are the other snapshots removed. CURRENT holds the sha256 of the snapshot's index.json, and index.json holds the size
and sha256 of every other file.
"""

from collections.abc import Callable
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import Any, NamedTuple

from vixml_jax.errors import InputError
from vixml_jax.files import new_file, new_folder
from vixml_jax.manifest import FileHashes, describe_file, describe_files, find_damage

INDEX = "index.json"
CURRENT = "CURRENT"
LOCK = ".lock"


class Snapshot(NamedTuple):
  """The snapshot that CURRENT names.

  Attributes:
    path: Folder of the snapshot.
    info: Content of its index.json, checked against the sha256 in CURRENT.
    pointer: Content of CURRENT when the snapshot was read.
  """

  path: Path
  info: dict[str, Any]
  pointer: str


def remedy(folder: Path) -> str:
  """Returns what to do about an index that cannot be used, as the end of an error message."""
  return (
    f"delete {folder} and run `python -m vixml_jax.evaluate --workdir={folder.parent}`, which writes a new one "
    "(labels that were added must be added again)"
  )


def read_pointer(folder: Path) -> str:
  """Returns the content of CURRENT, or "" if it cannot be read.

  A snapshot that was read earlier is still the current one exactly if its `pointer` equals this.
  """
  try:
    return (folder / CURRENT).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError):
    return ""


def read_current(folder: Path) -> Snapshot:
  """Returns the snapshot that CURRENT names.

  Raises:
    InputError: CURRENT or index.json is missing or damaged.
  """
  try:
    pointer = (folder / CURRENT).read_text(encoding="utf-8")
  except FileNotFoundError as error:
    raise InputError(
      f"{folder / CURRENT}: is missing, so there is no label index; "
      f"run `python -m vixml_jax.evaluate --workdir={folder.parent}`, which writes it"
    ) from error
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{folder / CURRENT}: cannot be read ({error}); {remedy(folder)}") from error
  name, _, digest = pointer.strip().partition(" ")
  if not name.isdigit():
    raise InputError(f"{folder / CURRENT}: does not name a snapshot but {name[:80]!r}; {remedy(folder)}")
  path = folder / name / INDEX
  try:
    content = path.read_bytes()
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy(folder)}") from error
  if hashlib.sha256(content).hexdigest() != digest:
    raise InputError(f"{path}: is damaged (its sha256 differs from that in {CURRENT}); {remedy(folder)}")
  return Snapshot(folder / name, json.loads(content), pointer)


def check_files(snapshot: Path, files: FileHashes, *, contents: bool) -> None:
  """Compares the files of a snapshot with its index.json.

  Args:
    snapshot: Folder of the snapshot.
    files: Size and sha256 of each file, by path within the folder.
    contents: Whether to read every file and compare its sha256; otherwise only sizes are compared.

  Raises:
    InputError: A file is missing or differs; the message names the first one.
  """
  damage = find_damage(snapshot, files, contents=contents)
  if damage:
    raise InputError(f"{snapshot / damage.name}: is damaged ({damage.reason}); {remedy(snapshot.parent)}")


def write_snapshot(folder: Path, fill: Callable[[Path], dict[str, Any]], former: Snapshot | None = None) -> None:
  """Writes the next snapshot, lets CURRENT name it and removes all others. Call it under the lock `LOCK`.

  Args:
    folder: Folder of the snapshots.
    fill: Function that writes the files into the folder it receives and returns the content of index.json without
      `files`, which is added here.
    former: Snapshot whose files may be linked into the new one by `link_or_copy`; linked files are not read again.
  """
  number = 1 + max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
  target = folder / f"{number:06d}"
  with new_folder(target) as work:
    info = fill(work)
    info["files"] = describe_files(work, lambda name, path: _known(former, name, path) or describe_file(path))
    content = (json.dumps(info, indent=2) + "\n").encode()
    (work / INDEX).write_bytes(content)
  with new_file(folder / CURRENT) as path:
    path.write_text(f"{target.name} {hashlib.sha256(content).hexdigest()}\n", encoding="utf-8")
  for path in folder.iterdir():
    if path.name.partition(".")[0].isdigit() and path != target:
      shutil.rmtree(path, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
  """Makes a file, or a folder of files, available at another path: by hard links where possible, else by copies."""
  if source.is_dir():
    target.mkdir()
    for path in source.iterdir():
      link_or_copy(path, target / path.name)
    return
  try:
    os.link(source, target)
  except OSError:
    shutil.copyfile(source, target)


def _known(former: Snapshot | None, name: str, path: Path) -> dict[str, Any] | None:
  """Returns size and sha256 of a file that is a hard link to that of the former snapshot; None for any other file."""
  if former is None or name not in former.info["files"] or not path.samefile(former.path / name):
    return None
  return dict(former.info["files"][name])
