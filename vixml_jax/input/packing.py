"""Packs short texts end to end into fixed rows, so that no compute goes to padding tokens.

A row of T tokens holds several texts ("slots" 1..S). Attention is block-diagonal over slots, positions
restart in each, and pooling sums by slot; so a packed text gets the embedding that it would get alone.
"""

import dataclasses

import numpy as np

from vixml_jax.ragged import Ragged


@dataclasses.dataclass(frozen=True)
class PackedLayout:
  """The static shape of packed rows.

  Attributes:
    row_length: T, tokens in a row.
    chunk_rows: rows that are encoded at a time, over the whole mesh.
  """

  row_length: int
  chunk_rows: int

  @property
  def slots(self) -> int:
    """S, the most texts a row may hold: texts of one token between two special ones fill it."""
    return max(self.row_length // 3, 1)


@dataclasses.dataclass(frozen=True)
class PackedTexts:
  """Texts laid out in chunks of rows.

  Attributes:
    tokens: int32 [chunks, R, T]; 0 where `segments` is 0.
    segments: int32 [chunks, R, T], slot 1..S of the token within its row; 0 for padding.
    positions: int32 [chunks, R, T], position of the token within its text.
    slots: int32 [texts], where each text's pooled vector lies in the flattened [chunks * R * S].
  """

  tokens: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  slots: np.ndarray

  @property
  def num_tokens(self) -> int:
    """Tokens of all texts, padding left out."""
    return int((self.segments > 0).sum())


def assign_rows(lengths: np.ndarray, row_length: int, max_slots: int) -> tuple[np.ndarray, np.ndarray]:
  """Best-fit decreasing: the row and the slot (0-based) of every text.

  Args:
    lengths: int [texts], each at most `row_length`.
    row_length: T.
    max_slots: S.

  Returns:
    int64 [texts] rows, int64 [texts] slots. Deterministic; longest first, ties by index.
  """
  rows = np.zeros(len(lengths), np.int64)
  slots = np.zeros(len(lengths), np.int64)
  open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # By tokens left.
  used_slots: list[int] = []
  sizes = lengths.tolist()
  # Texts of equal length come together, so the fullest row that fits is looked for only upwards.
  for text in np.argsort(-lengths, kind="stable").tolist():
    size = sizes[text]
    left = size
    while left <= row_length and not open_rows[left]:
      left += 1
    if left > row_length:
      row, left = len(used_slots), row_length
      used_slots.append(0)
    else:
      row = open_rows[left].pop()
    rows[text] = row
    slots[text] = used_slots[row]
    used_slots[row] += 1
    if used_slots[row] < max_slots and left > size:
      open_rows[left - size].append(row)
  return rows, slots


def bucket(chunks: int) -> int:
  """The next power of two: a run compiles a handful of programs, and empty chunks are skipped at run time."""
  return 1 << max(chunks - 1, 0).bit_length()


def pack(texts: Ragged, layout: PackedLayout, round_up: bool = True) -> PackedTexts:
  """Packs texts into rows.

  Args:
    texts: token ids; every text has 1..T tokens.
    layout: shape of the rows.
    round_up: fill up with empty chunks to the next bucket.

  Raises:
    ValueError: if a text is empty or longer than a row.
  """
  lengths = texts.lengths
  if len(lengths) and (lengths.min() < 1 or lengths.max() > layout.row_length):
    raise ValueError(f"texts of {lengths.min()}..{lengths.max()} tokens do not fit rows of {layout.row_length}")
  rows, slots = assign_rows(lengths, layout.row_length, layout.slots)
  needed = -(-int(rows.max(initial=-1) + 1) // layout.chunk_rows)
  num_chunks = bucket(needed) if round_up else needed
  shape = (num_chunks * layout.chunk_rows, layout.row_length)
  tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
  # Start of each text in its row: tokens of the same row in earlier slots.
  order = np.lexsort((slots, rows))
  ends = np.cumsum(lengths[order])
  row_starts = np.searchsorted(rows[order], np.arange(shape[0]))
  row_base = np.concatenate([[0], ends])[row_starts]
  starts = np.empty(len(lengths), np.int64)
  starts[order] = ends - lengths[order] - row_base[rows[order]]
  within = np.arange(texts.offsets[-1]) - np.repeat(texts.offsets[:-1], lengths)
  flat = np.repeat(rows * layout.row_length + starts, lengths) + within
  tokens.reshape(-1)[flat] = texts.values
  segments.reshape(-1)[flat] = np.repeat(slots + 1, lengths)
  positions.reshape(-1)[flat] = within
  chunked = (num_chunks, layout.chunk_rows, layout.row_length)
  return PackedTexts(
      tokens.reshape(chunked), segments.reshape(chunked), positions.reshape(chunked),
      (rows * layout.slots + slots).astype(np.int32))
