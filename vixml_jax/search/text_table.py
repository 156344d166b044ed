"""A table of texts stored in two arrays, with look-up by row and by text."""

from collections.abc import Iterable, Sequence
import dataclasses
import functools

import numpy as np

from vixml_jax.ragged import Ragged, ranges

_ROWS_HASHED = 65_536  # Rows whose bytes are hashed at a time, with several arrays of 8 bytes for each.
_QUERY_CHARS = 200  # Characters of a training query that an index keeps.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: odd, and its bits look random.


@dataclasses.dataclass(frozen=True)
class TextTable:
  """Texts by row, without a Python object for each.

  >>> table = TextTable.from_texts(["red", "green", "blue"])
  >>> table.take([2, 0])
  ['blue', 'red']
  >>> table.find(["green", "yellow"]).tolist()
  [1, -1]

  Attributes:
    rows: uint8, the UTF-8 of each text; may be memory-mapped.
  """

  rows: Ragged

  def __len__(self) -> int:
    return len(self.rows)

  @classmethod
  def from_texts(cls, texts: Sequence[str]) -> "TextTable":
    """Returns a table of the given texts."""
    encoded = [text.encode() for text in texts]
    return cls(Ragged.of_lengths(np.frombuffer(b"".join(encoded), np.uint8), [len(text) for text in encoded]))

  @classmethod
  def from_blocks(cls, blocks: Iterable[Sequence[str]]) -> "TextTable":
    """Returns a table of the texts of all blocks, of which one at a time is held as Python strings."""
    tables = [cls.from_texts(block).rows for block in blocks]
    values = np.concatenate([np.zeros(0, np.uint8), *(table.values for table in tables)])
    lengths = np.concatenate([np.zeros(0, np.int64), *(table.lengths for table in tables)])
    return cls(Ragged.of_lengths(values, lengths))

  def take(self, rows: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the texts of the given rows.

    Raises:
      IndexError: There is no such row.
    """
    rows = np.asarray(rows, np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
      raise IndexError(f"rows must be from 0 to {len(self) - 1}, not {rows.min()} to {rows.max()}")
    taken = self.rows.take(rows)
    content = taken.values.tobytes()
    return [content[start:stop].decode() for start, stop in zip(taken.offsets[:-1], taken.offsets[1:], strict=True)]

  def find(self, texts: Sequence[str]) -> np.ndarray:
    """Returns int32, for each text the last row that holds it, or -1."""
    hashes, order = self._sorted_hashes
    wanted = _hashes(TextTable.from_texts(texts).rows)
    first, last = (np.searchsorted(hashes, wanted, side=side) for side in ("left", "right"))
    found = np.full(len(texts), -1, np.int32)
    left = np.flatnonzero(first < last)
    while len(left):  # The last row of each hash first; others only where different texts have the same hash.
      last[left] -= 1
      rows = order[last[left]]
      equal = np.asarray([texts[int(place)] == text for place, text in zip(left, self.take(rows), strict=True)])
      found[left[equal]] = rows[equal]
      left = left[~equal & (first[left] < last[left])]
    return found

  def first_duplicate(self) -> str | None:
    """Returns a text that two rows hold, or None if all texts are distinct."""
    hashes, order = self._sorted_hashes
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
      candidates = self.take(order[hashes == hashes[place]])
      if len(set(candidates)) < len(candidates):
        return next(text for text in candidates if candidates.count(text) > 1)
    return None

  @functools.cached_property
  def _sorted_hashes(self) -> tuple[np.ndarray, np.ndarray]:
    """Hashes in ascending order, and the row of each; rows of equal hashes ascend."""
    blocks = [np.arange(first, min(first + _ROWS_HASHED, len(self))) for first in range(0, len(self), _ROWS_HASHED)]
    hashes = np.concatenate([np.zeros(0, np.uint64), *(_hashes(self.rows.take(block)) for block in blocks)])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order


def shown_text(text: str) -> str:
  """Returns what an index keeps of the text of a training query: its first 200 characters.

  >>> shown_text("red"), len(shown_text("red " * 100)), shown_text("red " * 100)[-3:]
  ('red', 200, 'ed…')
  """
  return text if len(text) <= _QUERY_CHARS else f"{text[: _QUERY_CHARS - 1].rstrip()}…"


def _hashes(rows: Ragged) -> np.ndarray:
  """Returns uint64, a polynomial hash of the bytes of each row, modulo 2**64."""
  lengths = rows.lengths
  powers = np.full(int(lengths.max(initial=0)), _FACTOR).cumprod()
  terms = (np.asarray(rows.values, np.uint64) + np.uint64(1)) * powers[ranges(0, lengths)]
  sums = np.concatenate([np.zeros(1, np.uint64), terms.cumsum()])
  return np.asarray(sums[rows.offsets[1:]] - sums[rows.offsets[:-1]])
