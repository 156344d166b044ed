"""Finished blocks of a batch job in a bucket, next to the result: `OUTPUT.partial/`.

Every process writes its blocks to a temporary folder and copies them to the bucket, the record of a block last. A
bucket has no locks. If two processes publish the result at once, they write the same bytes.
"""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import tempfile
from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.files import write_json
from vixml_jax.inference.part_store import JOB, PARTS, RECORDS, STATISTICS, LocalStore, PartStore, record_name
from vixml_jax.manifest import Damage, FileHashes, describe_file, read_hashes, write_hashes
from vixml_jax.remote import Bucket, downloaded, is_remote


def open_store(output: str, key: str) -> PartStore:
  """Returns the store of a job.

  Args:
    output: File or folder of the result, as a path or the URL of a bucket.
    key: Name of the job, from `job_key`.
  """
  return BucketStore(output, key) if is_remote(output) else LocalStore(Path(output), key)


class BucketStore:
  """A `PartStore` in a bucket.

  Args:
    output: URL of the file or folder of the result.
    key: Name of the job.
  """

  def __init__(self, output: str, key: str):
    parent, _, self._output = output.rpartition("/")
    self._bucket, self._root = Bucket(parent), f"{self._output}.partial"
    self._folder, self.place = f"{self._root}/{key}", f"{parent}/{self._root}"

  def former_jobs(self) -> list[dict[str, Any]]:
    """See `PartStore`."""
    names = self._bucket.sizes(self._root)
    keys = {name.split("/")[0] for name in names if f"/{RECORDS}/" in name}
    own = self._folder.rpartition("/")[2]
    return [json.loads(self._bucket.read(f"{self._root}/{key}/{JOB}")) for key in sorted(keys - {own})]

  def start(self, settings: dict[str, Any]) -> None:
    """See `PartStore`."""
    with self.work() as work:
      write_json(work / JOB, settings)
      self._bucket.put(work / JOB, f"{self._folder}/{JOB}")

  @contextlib.contextmanager
  def work(self) -> Iterator[Path]:
    """See `PartStore`."""
    with tempfile.TemporaryDirectory(prefix="vixml-") as folder:
      yield Path(folder)

  def add(self, number: int, files: dict[str, Path]) -> None:
    """See `PartStore`."""
    hashes = {name: describe_file(path) for name, path in files.items()}
    for name, path in files.items():
      self._bucket.put(path, f"{self._folder}/{name}")
    with self.work() as work:
      write_hashes(work / "record", hashes)
      self._bucket.put(work / "record", self._record(number))

  def finished(self) -> set[int]:
    """See `PartStore`."""
    return {int(name) for name in self._bucket.sizes(f"{self._folder}/{RECORDS}")}

  def record(self, number: int) -> FileHashes:
    """See `PartStore`."""
    with downloaded(self._bucket, self._record(number)) as (path, _):
      return read_hashes(path)

  def damage(self, number: int, *, contents: bool) -> Damage | None:
    """See `PartStore`. Only sizes are compared: `opened` compares the sha256 of what it downloads."""
    return self._find_damage(self._folder, self.record(number))

  def forget(self, number: int) -> None:
    """See `PartStore`."""
    self._bucket.remove(self._record(number))

  @contextlib.contextmanager
  def opened(self, number: int, name: str) -> Iterator[Path]:
    """See `PartStore`."""
    expected = self.record(number)[name]["sha256"]
    with downloaded(self._bucket, f"{self._folder}/{name}") as (path, digest):
      if digest != expected:
        self.forget(number)
        raise InputError(
          f"{self.place}/{name}: is damaged (its sha256 differs); start all processes again, and its queries are "
          "answered again"
        )
      yield path

  def locked(self, name: str) -> contextlib.AbstractContextManager[None]:
    """See `PartStore`. There is no lock."""
    return contextlib.nullcontext()

  def read_statistics(self) -> dict[str, Any] | None:
    """See `PartStore`."""
    name = f"{self._output}{STATISTICS}"
    if self._bucket.size(name) is None:
      return None
    try:
      value = json.loads(self._bucket.read(name))
    except ValueError:
      return None
    return value if isinstance(value, dict) else None

  def has_result(self) -> bool:
    """See `PartStore`."""
    return bool(self._bucket.sizes(self._output))

  def damage_of_result(self, files: FileHashes, *, contents: bool) -> Damage | None:
    """See `PartStore`. Only sizes are compared."""
    return self._find_damage("", files)

  def publish_file(self, whole: Path, others: dict[str, Path | None], statistics: dict[str, Any]) -> None:
    """See `PartStore`."""
    self._publish_others(others)
    self._bucket.put(whole, self._output)
    self._publish_statistics(statistics)

  def publish_parts(self, others: dict[str, Path | None], statistics: dict[str, Any]) -> None:
    """See `PartStore`."""
    self._publish_others(others)
    for name in self._bucket.sizes(f"{self._folder}/{PARTS}"):
      self._bucket.copy(f"{self._folder}/{PARTS}/{name}", f"{self._output}/{name}")
    self._publish_statistics(statistics)

  def remove(self) -> None:
    """See `PartStore`."""
    self._bucket.remove(self._folder if self.former_jobs() else self._root)

  def _find_damage(self, folder: str, files: FileHashes) -> Damage | None:
    for name, expected in files.items():
      size = self._bucket.size(f"{folder}/{name}" if folder else name)
      if size != expected["size"]:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {expected['size']:,}"
        return Damage(name, found)
    return None

  def _publish_others(self, others: dict[str, Path | None]) -> None:
    for suffix, path in others.items():
      if path is None:
        self._bucket.remove(f"{self._output}{suffix}")
      else:
        self._bucket.put(path, f"{self._output}{suffix}")

  def _publish_statistics(self, statistics: dict[str, Any]) -> None:
    """Writes the statistics, which make the result valid."""
    with self.work() as work:
      write_json(work / "statistics", statistics)
      self._bucket.put(work / "statistics", f"{self._output}{STATISTICS}")

  def _record(self, number: int) -> str:
    return f"{self._folder}/{RECORDS}/{record_name(number)}"
