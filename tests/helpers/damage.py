"""Ways in which a stored file is damaged, for tests of what is read afterwards."""

from collections.abc import Callable
from pathlib import Path


def flip_a_bit(path: Path) -> None:
  """Changes one bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def cut_off(path: Path) -> None:
  """Drops the second half of a file."""
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path: Path) -> None:
  """Drops the contents of a file."""
  path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], object]] = {
  "flipped bit": flip_a_bit,
  "cut off": cut_off,
  "empty": make_empty,
  "missing": Path.unlink,
}
"""Function that damages a file, by what it does."""


def files_of(folder: Path) -> list[str]:
  """Returns the sorted paths of all files within a folder."""
  return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
