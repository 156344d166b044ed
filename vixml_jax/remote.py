"""Files in buckets: `gs://`, `s3://`, and whatever else fsspec opens. Objects are copied to and from local files.

An object of a bucket appears whole or not at all, and every process sees it from then on.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import os
from pathlib import Path, PurePosixPath
import tempfile
import time
from typing import NamedTuple
import uuid

import fsspec

from vixml_jax.errors import InputError, install_command
from vixml_jax.files import fingerprint_of
from vixml_jax.manifest import cached_folder

_PACKAGES = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_RETRY_SECONDS = (1.0, 5.0)  # Between attempts to write; the packages of the buckets repeat single requests themselves.
MOUNT = "mount the bucket (gcsfuse, mountpoint-s3) and give the folder"
"""What to do where several processes would need a bucket that only one can use."""


class StoredFile(NamedTuple):
  """A file of a bucket.

  Attributes:
    size: Its bytes.
    version: Text that changes when the file is replaced.
  """

  size: int
  version: str


def is_remote(place: str | os.PathLike[str]) -> bool:
  """Returns whether a place is the URL of a bucket.

  >>> is_remote("gs://bucket/queries.jsonl"), is_remote("queries.jsonl")
  (True, False)
  """
  return "://" in str(place)


def cache_root() -> Path:
  """Returns the folder of copies of remote files, `~/.cache/vixml_jax`; `XDG_CACHE_HOME` replaces `~/.cache`."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vixml_jax"


def local_copy(place: str) -> Path:
  """Returns the path of a file. A remote one is copied to the cache, once for each of its versions.

  Raises:
    InputError: The file does not exist, or the bucket cannot be reached.
  """
  if not is_remote(place):
    return Path(place)
  parent, _, name = place.rpartition("/")
  bucket = Bucket(parent)
  key = fingerprint_of([place, bucket.version(name)])
  folder = cache_root() / "files" / key[:32]
  cached_folder(folder, lambda work: bucket.get(name, work / name))
  return folder / name


def local_table(place: str) -> Path:
  """Returns the path of a file or a folder. A remote one is copied to the cache, once for each of its versions.

  Raises:
    InputError: There is nothing at the place, or the bucket cannot be reached.
  """
  if not is_remote(place):
    return Path(place)
  bucket = Bucket(place)
  names = sorted(bucket.sizes())
  if not names or names == ["."]:  # A file, or nothing.
    return local_copy(place)
  key = fingerprint_of([place, {name: bucket.version(name) for name in names}])
  folder, own = cache_root() / "files" / key[:32], bucket.url.rpartition("/")[2]

  def copy(work: Path) -> None:
    for name in names:
      bucket.get(name, work / own / name)

  cached_folder(folder, copy)
  return folder / own


def local_data_dir(data_dir: str | os.PathLike[str]) -> Path:
  """Returns the local folder of prepared data; of a URL, the folder of the cache that holds the copies."""
  if not is_remote(data_dir):
    return Path(data_dir)
  protocol, _, path = str(data_dir).partition("://")
  return cache_root().joinpath("data", protocol, *(part for part in path.split("/") if part not in ("", ".", "..")))


def persistently(write: Callable[[], object]) -> None:
  """Calls a function that writes to a bucket; where it fails, twice more.

  Raises:
    InputError: All attempts failed; the error of the last one.
  """
  for seconds in _RETRY_SECONDS:
    try:
      write()
      return
    except InputError:
      time.sleep(seconds)
  write()


class Bucket:
  """A folder in a bucket.

  Attributes:
    url: Its URL.

  Args:
    url: URL, such as `gs://bucket/runs/a`.

  Raises:
    InputError: No installed package opens such URLs, or the bucket cannot be reached.
  """

  def __init__(self, url: str):
    self.url = url.rstrip("/")
    folders = {"auto_mkdir": True} if self.url.startswith("file://") else {}  # Buckets have no folders to make.
    with self._reaching(""):
      self._files, self._root = fsspec.core.url_to_fs(self.url, **folders)

  def sizes(self, folder: str = "") -> dict[str, int]:
    """Returns the bytes of each file in a folder and the folders in it, by path within the folder."""
    return {name: file.size for name, file in self.files(folder).items()}

  def files(self, folder: str = "") -> dict[str, StoredFile]:
    """Returns size and version of each file in a folder and the folders in it, by path within the folder."""
    root = self._path(folder).rstrip("/")
    with self._reaching(folder):
      self._files.invalidate_cache()
      try:
        found = self._files.find(root, detail=True)
      except FileNotFoundError:
        return {}
    return {
      str(PurePosixPath(name).relative_to(PurePosixPath(root))): StoredFile(
        info["size"], fingerprint_of({key: str(value) for key, value in info.items()})
      )
      for name, info in found.items()
    }

  def size(self, name: str) -> int | None:
    """Returns the bytes of a file; None if it does not exist."""
    with self._reaching(name):
      self._files.invalidate_cache()
      try:
        return self._files.info(self._path(name))["size"]
      except FileNotFoundError:
        return None

  def version(self, name: str) -> str:
    """Returns what changes when a file is replaced.

    Raises:
      InputError: The file does not exist.
    """
    with self._reaching(name):
      self._files.invalidate_cache()
      return str(self._files.ukey(self._path(name)))

  def read(self, name: str) -> bytes:
    """Returns the contents of a file.

    Raises:
      InputError: The file does not exist.
    """
    with self._reaching(name):
      return self._files.cat_file(self._path(name))

  def get(self, name: str, path: Path) -> None:
    """Copies a file to a local path.

    Raises:
      InputError: The file does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with self._reaching(name):
      self._files.get_file(self._path(name), str(path))

  def put(self, path: Path, name: str) -> None:
    """Copies a local file to the bucket."""
    with self._reaching(name):
      self._files.put_file(str(path), self._path(name))

  def write(self, name: str, contents: bytes) -> None:
    """Writes a file."""
    with self._reaching(name):
      self._files.pipe_file(self._path(name), contents)

  def check_writable(self) -> None:
    """Writes a file and removes it, before work is done whose result must be written.

    Raises:
      InputError: The bucket cannot be written.
    """
    name = f".probe-{uuid.uuid4().hex}"
    self.write(name, b"")
    self.remove(name)

  def copy(self, name: str, target: str) -> None:
    """Copies a file within the bucket."""
    with self._reaching(name):
      self._files.cp_file(self._path(name), self._path(target))

  def remove(self, name: str) -> None:
    """Removes a file, or a folder with all files in it, if it exists."""
    with self._reaching(name), contextlib.suppress(FileNotFoundError):
      self._files.rm(self._path(name), recursive=True)

  def _path(self, name: str) -> str:
    return f"{self._root}/{name}"

  @contextlib.contextmanager
  def _reaching(self, name: str) -> Iterator[None]:
    """Raises an error of one line that names the file; each package has exceptions of its own."""
    place = f"{self.url}/{name}" if name else self.url
    protocol = self.url.partition("://")[0]
    try:
      yield
    except FileNotFoundError as error:
      raise InputError(f"{place}: no such file") from error
    except ImportError as error:
      extra = _PACKAGES.get(protocol)
      advice = install_command(extra) if extra else "install the package that fsspec names"
      raise InputError(f"{place}: cannot be opened ({error}); {advice}") from error
    except Exception as error:
      lines = str(error).strip().splitlines() or [type(error).__name__]
      raise InputError(f"{place}: cannot be reached ({lines[0]}); check the URL and your credentials") from error


@contextlib.contextmanager
def downloaded(bucket: Bucket, name: str) -> Iterator[tuple[Path, str]]:
  """Yields the path of a temporary copy of a file, and its sha256."""
  with tempfile.TemporaryDirectory(prefix="vixml-") as folder:
    path = Path(folder) / "copy"
    bucket.get(name, path)
    with path.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    yield path, digest
