"""A folder whose contents are replaced as a whole: snapshots beside each other, of which CURRENT names the valid one.

Whenever a process is killed, CURRENT names a snapshot that is complete: it is replaced, in one step, after the next
one has been written in full, and only then are others removed. Files are checked by size and sha256: those of a
snapshot stand in its index.json, and that of index.json in CURRENT.
"""

from collections.abc import Callable
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.files import new_file, new_folder, sha256_of_file

INDEX = "index.json"
CURRENT = "CURRENT"
LOCK = ".lock"


def remedy(folder: Path) -> str:
  """What to do about an index that cannot be used."""
  return (
    f"delete {folder} and run `python -m vixml_jax.evaluate --workdir={folder.parent}`, which writes it anew "
    "(labels that were added must be added again)"
  )


def read_current(folder: Path) -> tuple[Path, dict[str, Any]]:
  """The valid snapshot and its index.json, which has been checked against CURRENT.

  Raises:
    InputError: there is none, or it is damaged.
  """
  try:
    name, _, digest = (folder / CURRENT).read_text(encoding="utf-8").strip().partition(" ")
  except FileNotFoundError as error:
    raise InputError(
      f"{folder / CURRENT} is missing, so there is no label index: "
      f"`python -m vixml_jax.evaluate --workdir={folder.parent}` writes it"
    ) from error
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{folder / CURRENT}: cannot be read ({error}); {remedy(folder)}") from error
  if not name.isdigit():
    raise InputError(f"{folder / CURRENT}: names no snapshot but {name[:80]!r}; {remedy(folder)}")
  path = folder / name / INDEX
  try:
    content = path.read_bytes()
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy(folder)}") from error
  if hashlib.sha256(content).hexdigest() != digest:
    raise InputError(f"{path}: is damaged, its sha256 is not that in {CURRENT}; {remedy(folder)}")
  return folder / name, json.loads(content)


def check_files(snapshot: Path, files: dict[str, dict[str, Any]], *, contents: bool) -> None:
  """Compares the files of a snapshot with what its index.json says.

  Args:
    snapshot: its folder.
    files: size and sha256 by path within the folder.
    contents: whether to read every file in full; otherwise sizes are compared.

  Raises:
    InputError: naming the first file that is missing or differs.
  """
  for name, wanted in files.items():
    path = snapshot / name
    try:
      size = path.stat().st_size
      wrong = f"has {size:,} bytes instead of {wanted['size']:,}" if size != wanted["size"] else None
      if not wrong and contents and sha256_of_file(path) != wanted["sha256"]:
        wrong = f"its sha256 is not that in {INDEX}"
    except OSError as error:
      wrong = f"cannot be read: {error.strerror}"
    if wrong:
      raise InputError(f"{path}: is damaged ({wrong}); {remedy(snapshot.parent)}")


def write_snapshot(
  folder: Path, fill: Callable[[Path], dict[str, Any]], known: dict[str, dict[str, Any]] | None = None
) -> None:
  """Writes the next snapshot, makes it the valid one and removes all others. Call it under the lock `LOCK`.

  Args:
    folder: holds the snapshots.
    fill: writes the files into the folder that it is given and returns what else index.json is to say.
    known: size and sha256 of files that need not be read again, by path.
  """
  number = 1 + max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
  target = folder / f"{number:06d}"
  with new_folder(target) as work:
    info = fill(work)
    info["files"] = {
      path.relative_to(work).as_posix(): (known or {}).get(path.relative_to(work).as_posix()) or _describe(path)
      for path in sorted(work.rglob("*"))
      if path.is_file()
    }
    content = (json.dumps(info, indent=2) + "\n").encode()
    (work / INDEX).write_bytes(content)
    _sync(work / INDEX)
  with new_file(folder / CURRENT) as path:
    path.write_text(f"{target.name} {hashlib.sha256(content).hexdigest()}\n", encoding="utf-8")
    _sync(path)
  for path in folder.iterdir():
    if path.name.partition(".")[0].isdigit() and path != target:
      shutil.rmtree(path, ignore_errors=True)


def take_over(source: Path, target: Path) -> None:
  """The same file, or folder of files, at another place: linked where the file system can, else copied."""
  if source.is_dir():
    target.mkdir()
    for path in source.iterdir():
      take_over(path, target / path.name)
    return
  try:
    os.link(source, target)
  except OSError:
    shutil.copyfile(source, target)


def _describe(path: Path) -> dict[str, Any]:
  _sync(path)
  return {"size": path.stat().st_size, "sha256": sha256_of_file(path)}


def _sync(path: Path) -> None:
  """Waits until the file is on the disk, so that CURRENT never names what a power cut loses."""
  with path.open("rb") as file:
    os.fsync(file.fileno())
