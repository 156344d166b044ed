"""Reads files in .zip and .tar.gz archives as streams; nothing is ever extracted to disk."""

import dataclasses
import functools
import gzip
import io
from pathlib import Path, PurePosixPath
import tarfile
from typing import IO
import zipfile
import zlib

from vixml_jax.errors import InputError

SUFFIXES = (".zip", ".tar.gz", ".tgz")
"""Ends of the names of archives that can be read."""

_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, NotImplementedError, ValueError)
_BUFFER_BYTES = 1 << 20
_ENCRYPTED = 0x1  # Bit of the flags of a zip member.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


@dataclasses.dataclass(frozen=True)
class Member:
  """A file in an archive, with the methods of `pathlib.Path` that the readers of raw files use.

  Attributes:
    archive: Path of the archive.
    inner: Path of the file in the archive.
    size: Number of bytes of the file, as the archive states it.
    offset: Position of its bytes in the unzipped tar file; -1 in a zip file.
  """

  archive: Path
  inner: str
  size: int
  offset: int = -1

  def __str__(self) -> str:
    return f"{self.archive}/{self.inner}"

  @property
  def name(self) -> str:
    """The name of the file without its folders."""
    return PurePosixPath(self.inner).name

  def open(self, mode: str = "rb") -> IO[bytes]:
    """Opens the file for reading bytes.

    Raises:
      InputError: The archive has been changed or removed since it was listed.
    """
    if mode != "rb":
      raise ValueError(f"mode {mode!r}: files in archives are read as bytes")
    try:
      if self.offset < 0:
        with zipfile.ZipFile(self.archive) as archive:
          return archive.open(self.inner)  # It stays open when the archive is closed.
      return io.BufferedReader(_TarStream(self.archive, self.offset, self.size), _BUFFER_BYTES)
    except (*_ERRORS, KeyError) as error:
      raise _unreadable(self.archive, error) from error


def is_archive(path: Path) -> bool:
  """Returns whether the name of a file is that of an archive."""
  return path.name.lower().endswith(SUFFIXES) and path.is_file()


def find_members(path: Path, names: frozenset[str]) -> dict[str, Member]:
  """Returns the files of an archive that have one of the given names, in any folder.

  Args:
    path: Path of the archive.
    names: Names of files, without folders.

  Raises:
    InputError: The archive cannot be read; a name occurs twice; or a file with one of these names is encrypted, is a
      link, is compressed in a way that Python cannot read, or has a path that leaves the archive.
  """
  stat = path.stat()
  return dict(_find_members(path, names, stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _find_members(path: Path, names: frozenset[str], size: int, modified: int) -> tuple[tuple[str, Member], ...]:
  """Finds members. Size and time of change make the cache forget an archive that has been replaced."""
  found: dict[str, Member] = {}
  try:
    for member, problem in _zip_members(path, names) if path.suffix.lower() == ".zip" else _tar_members(path, names):
      if problem:
        raise InputError(f"{member}: {problem}")
      if ".." in PurePosixPath(member.inner).parts or member.inner.startswith(("/", "\\")):
        raise InputError(f"{member}: its path leaves the archive; unpack the archive yourself if you trust it")
      if member.name in found:
        raise InputError(
          f"{path}: has {member.name} twice, as {found[member.name].inner} and {member.inner}; unpack the archive and "
          "set --config.dataset.raw_dir to the folder with the right one"
        )
      found[member.name] = member
  except InputError:
    raise
  except _ERRORS as error:
    raise _unreadable(path, error) from error
  return tuple(found.items())


def _zip_members(path: Path, names: frozenset[str]) -> list[tuple[Member, str]]:
  """Returns the members of a zip file with the given names, each with the reason why it cannot be read, or ""."""
  found = []
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      if PurePosixPath(info.filename).name in names and not info.is_dir():
        problem = ""
        if info.flag_bits & _ENCRYPTED:
          problem = "is encrypted; unpack the archive with its password and set --config.dataset.raw_dir to the folder"
        elif info.compress_type not in _METHODS:
          problem = f"is compressed with method {info.compress_type}, which Python cannot read; unpack the archive"
        elif (info.external_attr >> 16) & 0o170000 == 0o120000:
          problem = "is a link, not a file; unpack the archive"
        found.append((Member(path, info.filename, info.file_size), problem))
  return found


def _tar_members(path: Path, names: frozenset[str]) -> list[tuple[Member, str]]:
  """The same for a tar file. Its list of files is found by reading it to its end."""
  found = []
  with tarfile.open(path, "r:gz") as archive:
    for info in archive:
      if PurePosixPath(info.name).name in names and not info.isdir():
        problem = "" if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else "is not a plain file; unpack the archive"
        found.append((Member(path, info.name, info.size, info.offset_data), problem))
      archive.members = []  # type: ignore[attr-defined]  # Otherwise it keeps an object for every file.
  return found


class _TarStream(io.RawIOBase):
  """The bytes of one file of a .tar.gz archive."""

  def __init__(self, path: Path, offset: int, size: int):
    self._file = gzip.open(path, "rb")  # noqa: SIM115, `close` closes it.
    self._file.seek(offset)
    self._left = size

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
    chunk = self._file.read1(min(len(buffer), self._left))
    if not chunk and self._left and len(buffer):
      raise EOFError("the archive ends within this file")
    buffer[: len(chunk)] = chunk
    self._left -= len(chunk)
    return len(chunk)

  def close(self) -> None:
    self._file.close()
    super().close()


def _unreadable(path: Path, error: Exception) -> InputError:
  kind = "zip" if path.suffix.lower() == ".zip" else "tar.gz"
  return InputError(f"{path}: not a readable {kind} archive ({error}); download it again")
