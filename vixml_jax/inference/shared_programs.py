"""Compiled programs in a place that servers share, such as a bucket: a new machine copies them instead of compiling.

The place has a folder for each kind of machine and version of JAX, which holds one file for each program. The end of a
file's name is the sha256 of its contents, so that a file that was cut off is found and written again.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import logging
from pathlib import Path
import time
from typing import TypeVar

import jax
import jaxlib

from vixml_jax.errors import InputError
from vixml_jax.files import new_file
from vixml_jax.remote import Bucket
from vixml_jax.stages import stage

_PROGRAM, _USED = "-cache", "-atime"  # JAX's names: a program, and when it was last used.
_HASH_CHARS = 32
_THREADS = 16
_In, _Out = TypeVar("_In"), TypeVar("_Out")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SharedPrograms:
  """A folder of compiled programs, and the place that it is filled from and added to.

  Attributes:
    place: URL, such as `gs://bucket/programs`.
    folder: The folder that JAX reads and writes.
    machine: Name of machines with the same instructions.
    whole: Names of the files that the place has and that are as they were written.
  """

  place: str
  folder: Path
  machine: str
  whole: set[str] = dataclasses.field(default_factory=set)

  def fetch(self) -> int:
    """Copies the programs that the folder lacks and returns their number.

    A place that cannot be reached is named in a warning: the server then compiles, as without it.
    """
    try:
      bucket = self._bucket()
      found = [name for name in bucket.sizes() if _PROGRAM in name]
      with stage(f"read {len(found)} compiled programs from {bucket.url}"):
        copied = sum(_in_threads(lambda name: self._fetch(bucket, name), found))
    except InputError as error:
      _log.warning("compiled programs are not read: %s", error)
      return 0
    return copied

  def store(self) -> int:
    """Copies the programs that the place lacks to it and returns their number.

    A place that cannot be written to, such as a volume that is mounted for reading, is named in a warning.
    """
    try:
      named = [(path, f"{path.name}.{_hash(path.read_bytes())}") for path in self.folder.glob(f"*{_PROGRAM}")]
      missing = [(path, name) for path, name in named if name not in self.whole]
      bucket = self._bucket()
      _in_threads(lambda each: bucket.put(*each), missing)
    except (InputError, OSError) as error:  # JAX removes a program meanwhile, or the place is for reading only.
      _log.warning("compiled programs are not stored for other servers: %s", error)
      return 0
    if missing:
      _log.info("stored %d compiled programs in %s", len(missing), bucket.url)
    self.whole.update(name for _, name in missing)
    return len(missing)

  def _bucket(self) -> Bucket:
    return Bucket(f"{self.place.rstrip('/')}/{self.machine}-jax{jax.__version__}-{jaxlib.__version__}")

  def _fetch(self, bucket: Bucket, name: str) -> bool:
    own, _, wanted = name.partition(".")
    path, content = self.folder / own, bucket.read(name)
    if _hash(content) != wanted:
      return False  # It was cut off. It is compiled here, and stored again.
    self.whole.add(name)
    if path.exists():
      return False
    # JAX removes the programs that were not used for the longest time, by these files.
    (self.folder / f"{own.removesuffix(_PROGRAM)}{_USED}").write_bytes(time.time_ns().to_bytes(8, "little"))
    with new_file(path) as work:
      work.write_bytes(content)
    return True


def _hash(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:_HASH_CHARS]


def _in_threads(call: Callable[[_In], _Out], values: Iterable[_In]) -> list[_Out]:
  with ThreadPoolExecutor(_THREADS, thread_name_prefix="programs") as pool:
    return list(pool.map(call, values))
