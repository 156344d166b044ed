"""Where the finished blocks of a batch job are kept until they are published, and where the result appears.

A store has a folder for each job, named after the fingerprint of its settings, so that blocks of two jobs are never
mixed. Each finished block has a record with the size and sha256 of its files, which is written last. Several processes
may add blocks to a store at once, and it does no harm if two of them add the same block.
"""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import shutil
from typing import Any, Protocol
import uuid

from vixml_jax.errors import InputError
from vixml_jax.files import (
  fingerprint_of,
  locked,
  make_folder,
  read_json_object,
  remove_folder,
  sync_folder,
  write_json,
  writing,
)
from vixml_jax.manifest import Damage, FileHashes, describe_file, find_damage, read_hashes, write_hashes
from vixml_jax.remote import is_remote

JOB, RECORDS, PARTS = "job.json", "done", "parts"
"""Names in the folder of a job: its settings, the records of finished blocks, the parts."""
STATISTICS = ".stats.json"
"""Suffix of the file of statistics next to a result."""


class PartStore(Protocol):
  """A place of finished blocks and of the result.

  Attributes:
    place: Name of the place of the blocks, for messages.
  """

  place: str

  def former_jobs(self) -> list[dict[str, Any]]:
    """Returns the settings of other jobs that have finished blocks here."""

  def start(self, settings: dict[str, Any]) -> None:
    """Makes the place of this job. All processes of a job write the same."""

  def work(self) -> contextlib.AbstractContextManager[Path]:
    """Returns a new local folder for the files of a block, which is removed afterwards."""

  def add(self, number: int, files: dict[str, Path]) -> None:
    """Moves the files of a block into the store, by name, and records them."""

  def finished(self) -> set[int]:
    """Returns the numbers of all blocks that have a record."""

  def record(self, number: int) -> FileHashes:
    """Returns size and sha256 of the files of a finished block.

    Raises:
      InputError: The record is damaged.
    """

  def damage(self, number: int, *, contents: bool) -> Damage | None:
    """Returns what is wrong with the files of a finished block; None if they are those of its record."""

  def forget(self, number: int) -> None:
    """Removes the record of a block."""

  def opened(self, number: int, name: str) -> contextlib.AbstractContextManager[Path]:
    """Returns the local path of a file of a finished block, of which it may be a copy that is removed afterwards.

    Raises:
      InputError: The copy differs from the block's record.
    """

  def locked(self, name: str) -> contextlib.AbstractContextManager[None]:
    """Returns a lock among the processes of one machine, and of several where their file system has locks."""

  def read_statistics(self) -> dict[str, Any] | None:
    """Returns what `publish_file` or `publish_parts` has written last; None without any."""

  def has_result(self) -> bool:
    """Returns whether a file or folder is at the place of the result."""

  def damage_of_result(self, files: FileHashes, *, contents: bool) -> Damage | None:
    """Returns what is wrong with the result; None if it has these files."""

  def publish_file(self, whole: Path, others: dict[str, Path | None], statistics: dict[str, Any]) -> None:
    """Moves a joined file to its place, beside other files by suffix; a suffix without a file is removed."""

  def publish_parts(self, others: dict[str, Path | None], statistics: dict[str, Any]) -> None:
    """Moves the folder of parts to its place; see `publish_file`."""

  def remove(self) -> None:
    """Removes the finished blocks."""


def check_writable(output: str) -> None:
  """Checks the folder of an output; a bucket is checked when the first block is written.

  Raises:
    InputError: It does not exist or cannot be written to.
  """
  folder = Path(output).parent
  if is_remote(output):
    return
  if not folder.is_dir():
    raise InputError(f"{folder}: no such folder; create it or use another --output")
  if not os.access(folder, os.W_OK):
    raise InputError(f"{folder}: cannot be written to; use another --output")


def job_key(settings: dict[str, Any]) -> str:
  """Returns the name of the folder of a job."""
  return fingerprint_of(settings)[:16]


def record_name(number: int) -> str:
  """Returns the name of the record of a block."""
  return f"{number:08d}"


def part_name(name: str) -> str:
  """Returns the name within a store of a part, which `publish_parts` moves."""
  return f"{PARTS}/{name}"


class LocalStore:
  """A folder next to the result: `OUTPUT.partial/`.

  Args:
    output: File or folder of the result.
    key: Name of the job, from `job_key`.
  """

  def __init__(self, output: Path, key: str):
    self._output, self._root = output, output.with_name(f"{output.name}.partial")
    self._folder, self.place = self._root / key, str(self._root)

  def former_jobs(self) -> list[dict[str, Any]]:
    """See `PartStore`."""
    again = "delete its folder to start again"
    others = (path for path in self._root.glob(f"*/{JOB}") if path.parent != self._folder)
    return [
      read_json_object(path, absent=again, damaged=again)
      for path in others
      if any((path.parent / RECORDS).glob("[0-9]*"))
    ]

  def start(self, settings: dict[str, Any]) -> None:
    """See `PartStore`."""
    with writing(self._folder):
      for name in (RECORDS, PARTS):
        make_folder(self._folder / name)
      if not (self._folder / JOB).exists():
        with self.work() as work:
          write_json(work / JOB, settings)
          (work / JOB).replace(self._folder / JOB)
          sync_folder(self._folder)

  @contextlib.contextmanager
  def work(self) -> Iterator[Path]:
    """See `PartStore`."""
    folder = self._folder / f"{uuid.uuid4().hex}.incomplete"
    try:
      with writing(self._folder):
        folder.mkdir()
      yield folder
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  def add(self, number: int, files: dict[str, Path]) -> None:
    """See `PartStore`."""
    hashes = {}
    for name, path in files.items():
      with writing(self._folder / name):
        hashes[name] = describe_file(path)
        path.replace(self._folder / name)
        sync_folder((self._folder / name).parent)
    with self.work() as work, writing(self._record(number)):
      write_hashes(work / "record", hashes)
      (work / "record").replace(self._record(number))
      sync_folder(self._folder / RECORDS)

  def finished(self) -> set[int]:
    """See `PartStore`."""
    return {int(path.name) for path in (self._folder / RECORDS).glob("[0-9]*")}

  def record(self, number: int) -> FileHashes:
    """See `PartStore`."""
    return read_hashes(self._record(number))

  def damage(self, number: int, *, contents: bool) -> Damage | None:
    """See `PartStore`."""
    return find_damage(self._folder, self.record(number), contents=contents)

  def forget(self, number: int) -> None:
    """See `PartStore`."""
    self._record(number).unlink(missing_ok=True)

  @contextlib.contextmanager
  def opened(self, number: int, name: str) -> Iterator[Path]:
    """See `PartStore`."""
    yield self._folder / name

  def locked(self, name: str) -> contextlib.AbstractContextManager[None]:
    """See `PartStore`."""
    return locked(self._root / f"{name}.lock")

  def read_statistics(self) -> dict[str, Any] | None:
    """See `PartStore`."""
    try:
      value = json.loads(self._beside(STATISTICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return None
    return value if isinstance(value, dict) else None

  def has_result(self) -> bool:
    """See `PartStore`."""
    return self._output.exists()

  def damage_of_result(self, files: FileHashes, *, contents: bool) -> Damage | None:
    """See `PartStore`."""
    return find_damage(self._output.parent, files, contents=contents)

  def publish_file(self, whole: Path, others: dict[str, Path | None], statistics: dict[str, Any]) -> None:
    """See `PartStore`."""
    self._publish_others(others, statistics)
    whole.replace(self._output)
    sync_folder(self._output.parent)

  def publish_parts(self, others: dict[str, Path | None], statistics: dict[str, Any]) -> None:
    """See `PartStore`."""
    self._publish_others(others, statistics)
    (self._folder / PARTS).rename(self._output)
    sync_folder(self._output.parent)

  def remove(self) -> None:
    """See `PartStore`."""
    if self._folder.exists() or not self._root.exists():  # Of a removal that was interrupted, the name is changed.
      remove_folder(self._folder if self.former_jobs() else self._root)

  def _publish_others(self, others: dict[str, Path | None], statistics: dict[str, Any]) -> None:
    for suffix, path in others.items():
      target = self._beside(suffix)
      if path is None:
        target.unlink(missing_ok=True)
      else:
        path.replace(target)
    write_json(self._beside(STATISTICS), statistics)

  def _beside(self, suffix: str) -> Path:
    return self._output.with_name(f"{self._output.name}{suffix}")

  def _record(self, number: int) -> Path:
    """Returns the file with size and sha256 of the files of a finished block."""
    return self._folder / RECORDS / record_name(number)
