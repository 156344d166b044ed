"""Ways in which a stored file is damaged, for tests of what is read afterwards."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq


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


def hide_a_page(path: Path) -> None:
  """Flips a bit in the header of a page of a Parquet file, its first column's last, so that pyarrow skips the page."""
  metadata = pq.read_metadata(path)
  start = metadata.row_group(metadata.num_row_groups - 1).column(0).data_page_offset
  content = bytearray(path.read_bytes())
  assert content[start : start + 2] == b"\x15\x00"  # Field 1, the kind of page, is 0: a page of data.
  content[start + 1] = 2  # 1 in Thrift's zigzag: a page of an index.
  path.write_bytes(content)


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
