"""A batch job that is done block by block: which blocks this process has to do, and what happens after the last one.

Blocks are divided among processes by their number. The process that finds the last block finished publishes the
result. So no process has to wait for another one, and the same commands, in any number, continue a job that was killed.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import logging
from pathlib import Path
import time
from typing import Any, NamedTuple

from vixml_jax.errors import InputError
from vixml_jax.files import sync_file, writing
from vixml_jax.inference.part_store import PartStore, job_key, part_name
from vixml_jax.manifest import FileHashes, describe_file
from vixml_jax.process_share import ProcessShare

_POLL_SECONDS = 1.0
BAD_IMAGES = ".bad_images.jsonl"
"""Suffix of the file next to a result that lists images that could not be read."""

_log = logging.getLogger(__name__)


class ResultFiles(NamedTuple):
  """Names of the files of a result, and how its parts are joined.

  Attributes:
    name: Name of the result.
    part: Start of the names of parts.
    suffix: Suffix of the names of parts.
    join: Writes all parts to one file; None to leave them as they are, in a folder.
  """

  name: str
  part: str
  suffix: str
  join: Callable[[Iterable[Path], Path], None] | None


class BlockJob:
  """The blocks of a job.

  Args:
    store: Place of the finished blocks.
    settings: Whatever determines the contents of the blocks, as JSON.
    files: Names of the result's files.
    share: Share of this process.

  Attributes:
    count: Number of blocks, once the job has started.
  """

  def __init__(self, store: PartStore, settings: dict[str, Any], files: ResultFiles, share: ProcessShare):
    self._store, self._settings, self._files, self._share = store, settings, files, share
    self.count = 0

  @contextlib.contextmanager
  def started(self, count: int) -> Iterator[None]:
    """Makes the place of the job. On one machine, a share is done by one process at a time.

    Args:
      count: Number of blocks.

    Raises:
      InputError: The place has blocks of another job.
    """
    self.count = count
    with self._store.locked(f"{self._share.index}-of-{self._share.count}"):
      for former in self._store.former_jobs():
        other = sorted(
          key for key in former.keys() | self._settings.keys() if former.get(key) != self._settings.get(key)
        )
        raise InputError(
          f"{self._store.place}: was started with another {', '.join(other)}; use the former value, or delete this "
          "folder to start again"
        )
      self._store.start(self._settings)
      yield

  def missing(self) -> set[int]:
    """Returns the blocks of this process that are not finished, and logs which have to be done again."""
    own = {number for number in range(self.count) if self._share.has(number)}
    return own - {number for number in own & self._store.finished() if self._is_whole(number)}

  def _is_whole(self, number: int) -> bool:
    """Returns whether the files of a block are those that were recorded when they were on the disk."""
    try:
      damage = self._store.damage(number, contents=True)
    except InputError as error:
      _log.warning("%s; its queries are answered again", error)
      return False
    if damage:
      _log.warning("%s/%s: %s, so its queries are answered again", self._store.place, damage.name, damage.reason)
    return damage is None

  def write(self, number: int, write_part: Callable[[Path], None], write_bad: Callable[[Path], None] | None) -> None:
    """Writes a block, and the sizes and hashes of its files after they have reached the disk.

    Args:
      number: Number of the block.
      write_part: Writes the part.
      write_bad: Writes the lines of `BAD_IMAGES`; None if all images could be read.
    """
    with writing(f"{self._store.place}/{self._part(number)}"), self._store.work() as work:
      files = {self._part(number): work / "part"}
      write_part(work / "part")
      if write_bad is not None:
        files[self._bad(number)] = work / "bad"
        write_bad(work / "bad")
      self._store.add(number, files)

  def published(self, *, contents: bool = True) -> dict[str, Any] | None:
    """Returns the statistics of the result if this job has published it and it is whole, else None.

    Args:
      contents: Whether to compare the sha256 of the result, not only its size.
    """
    found = self._store.read_statistics()
    if found is None or found.get("job") != self._key():
      return None
    return None if self._store.damage_of_result(found["files"], contents=contents) else found

  def finish(self, statistics: dict[str, Any]) -> dict[str, Any] | None:
    """Publishes the result if all blocks are finished.

    Joined processes end together: process 0 waits for the blocks of the others, which wait for the result.

    Args:
      statistics: Statistics to publish.

    Returns:
      What was published; None if other processes still have blocks to do.

    Raises:
      InputError: A block is damaged. It is done again when the job is started again.
    """
    while self._share.joined and (self._unfinished() if self._share.index == 0 else not self.published(contents=False)):
      time.sleep(_POLL_SECONDS)
    unfinished = self._unfinished()
    if (found := self.published()) is not None:
      return found
    if unfinished:
      return None
    with self._store.locked("publish"):
      if (found := self.published()) is not None:  # Another process has published it meanwhile.
        return found
      try:
        return self._publish(statistics)
      except InputError:
        if (found := self.published()) is None:  # Where there are no locks, another process may have removed blocks.
          raise
        return found

  def _unfinished(self) -> set[int]:
    return set(range(self.count)) - self._store.finished()

  def _publish(self, statistics: dict[str, Any]) -> dict[str, Any]:
    records = [self._whole_record(number) for number in range(self.count)]
    with writing(self._store.place), self._store.work() as work:
      bad = work / "bad"
      lines = self._join_bad(records, bad)
      others = {BAD_IMAGES: bad if lines else None}
      published = statistics | {"job": self._key()}
      parts = [self._part(number) for number in range(self.count)]
      if self._files.join is None:
        hashes = (record[part] for part, record in zip(parts, records, strict=True))
        published["files"] = {
          f"{self._files.name}/{Path(part).name}": entry for part, entry in zip(parts, hashes, strict=True)
        }
        self._store.publish_parts(others, published)
      else:
        whole = work / "whole"
        self._files.join(self._opened(parts), whole)
        published["files"] = {self._files.name: describe_file(whole)}
        self._store.publish_file(whole, others, published)
    if lines:
      _log.warning(
        "%d images could not be read and were left out; %s%s lists them", lines, self._files.name, BAD_IMAGES
      )
    self._store.remove()
    return published

  def _whole_record(self, number: int) -> FileHashes:
    """Returns the record of a block whose files are whole."""
    try:
      damage, record = self._store.damage(number, contents=True), self._store.record(number)
    except InputError as error:
      reason = str(error)
    else:
      if damage is None:
        return record
      reason = f"{self._store.place}/{damage.name}: is damaged ({damage.reason})"
    self._store.forget(number)
    raise InputError(f"{reason}; start all processes again, and its queries are answered again")

  def _opened(self, parts: Iterable[str]) -> Iterator[Path]:
    for number, part in enumerate(parts):
      with self._store.opened(number, part) as path:
        yield path

  def _join_bad(self, records: Iterable[FileHashes], target: Path) -> int:
    """Joins the lists of images that could not be read, and returns the number of their lines."""
    lines = 0
    with target.open("wb") as joined:
      for number, record in enumerate(records):
        if self._bad(number) in record:
          with self._store.opened(number, self._bad(number)) as path:
            content = path.read_bytes()
          joined.write(content)
          lines += content.count(b"\n")
    if lines:
      sync_file(target)
    return lines

  def _key(self) -> str:
    return job_key(self._settings)

  def _part(self, number: int) -> str:
    return part_name(f"{self._files.part}{number:05d}-of-{self.count:05d}{self._files.suffix}")

  def _bad(self, number: int) -> str:
    return f"bad-{number:08d}"
