"""Packs short items end to end into fixed rows, so that no compute goes to padding tokens.

A row of T tokens holds several items ("slots" 1..S). Attention is block-diagonal over slots, positions
restart in each, and pooling sums by slot; so a packed item gets the embedding that it would get alone.
"""

import dataclasses

import numpy as np

from vixml_jax.input.items import Items
from vixml_jax.ragged import Ragged, spread

_SHORTEST = 3  # Tokens of a text: two special ones around one.
_SHORTEST_WITH_IMAGES = 2  # An empty title leaves the special ones.


@dataclasses.dataclass(frozen=True)
class PackedLayout:
  """The static shape of packed rows.

  Attributes:
    row_length: T, tokens in a row.
    chunk_rows: rows that are encoded at a time, over the whole mesh.
    images: I, the most images an item has; 0 for texts only.
    image_order: where an item's images stand: "before" its text or "after" it, as tokens of the row, or
      "apart" from the tokens, for late fusion.
  """

  row_length: int
  chunk_rows: int
  images: int = 0
  image_order: str = "before"

  @property
  def slots(self) -> int:
    """S, the most items a row may hold: texts of one token between two special ones fill it."""
    return max(self.row_length // _SHORTEST, 1)

  @property
  def image_places(self) -> int:
    """J, the most images that fit a row: those of items with I images and the shortest text."""
    if self.image_order == "apart":
      return self.slots * self.images
    return self.row_length * self.images // (self.images + _SHORTEST_WITH_IMAGES)


@dataclasses.dataclass(frozen=True)
class PackedImages:
  """The images of packed items, J places a row.

  Attributes:
    rows: int32 [chunks, R, J], row of the feature bank; 0 for an empty place.
    segments: int32 [chunks, R, J], slot 1..S of the image's item; 0 for an empty place.
    positions: int32 [chunks, R, J], place of the image among its row's tokens; T where it has none.
  """

  rows: np.ndarray
  segments: np.ndarray
  positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackedItems:
  """Items laid out in chunks of rows.

  Attributes:
    tokens: int32 [chunks, R, T]; 0 for an image and where `segments` is 0.
    segments: int32 [chunks, R, T], slot 1..S of the token within its row; 0 for padding.
    positions: int32 [chunks, R, T], position of the token within its item, images counted.
    slots: int32 [items], where each item's pooled vector lies in the flattened [chunks * R * S].
    images: where the images go; None for a layout of texts only.
  """

  tokens: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  slots: np.ndarray
  images: PackedImages | None

  @property
  def num_tokens(self) -> int:
    """Tokens of all items, images among them, padding left out."""
    return int((self.segments > 0).sum())


def assign_rows(lengths: np.ndarray, row_length: int, max_slots: int) -> tuple[np.ndarray, np.ndarray]:
  """Best-fit decreasing: the row and the slot (0-based) of every item.

  Args:
    lengths: int [items], each at most `row_length`.
    row_length: T.
    max_slots: S.

  Returns:
    int64 [items] rows, int64 [items] slots. Deterministic; longest first, ties by index.
  """
  rows = np.zeros(len(lengths), np.int64)
  slots = np.zeros(len(lengths), np.int64)
  open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # By tokens left.
  used_slots: list[int] = []
  sizes = lengths.tolist()
  # Items of equal length come together, so the fullest row that fits is looked for only upwards.
  for item in np.argsort(-lengths, kind="stable").tolist():
    size = sizes[item]
    left = size
    while left <= row_length and not open_rows[left]:
      left += 1
    if left > row_length:
      row, left = len(used_slots), row_length
      used_slots.append(0)
    else:
      row = open_rows[left].pop()
    rows[item] = row
    slots[item] = used_slots[row]
    used_slots[row] += 1
    if used_slots[row] < max_slots and left > size:
      open_rows[left - size].append(row)
  return rows, slots


def bucket(chunks: int) -> int:
  """The next power of two: a run compiles a handful of programs, and empty chunks are skipped at run time."""
  return 1 << max(chunks - 1, 0).bit_length()


def pack(items: Items, layout: PackedLayout, round_up: bool = True) -> PackedItems:
  """Packs items into rows.

  Args:
    items: texts of 1..T tokens, of 2 or more where there are images, with at most `layout.images` images; both
      together fit a row.
    layout: shape of the rows.
    round_up: fill up with empty chunks to the next bucket.

  Raises:
    ValueError: if a text is too short, or an item is longer than a row or has too many images.
  """
  texts, images = items.tokens, items.images
  if len(items) and images.lengths.max() > layout.images:
    raise ValueError(f"items of up to {images.lengths.max()} images in a layout of {layout.images}")
  in_row = np.zeros(len(items), np.int64) if layout.image_order == "apart" else images.lengths
  lengths = texts.lengths + in_row
  if len(items) and (texts.lengths.min() < 1 or lengths.max() > layout.row_length):
    raise ValueError(f"items of {texts.lengths.min()}..{lengths.max()} tokens do not fit rows of {layout.row_length}")
  if (texts.lengths[in_row > 0] < _SHORTEST_WITH_IMAGES).any():
    raise ValueError(f"a text with images has fewer than {_SHORTEST_WITH_IMAGES} tokens")
  rows, slots = assign_rows(lengths, layout.row_length, layout.slots)
  needed = -(-int(rows.max(initial=-1) + 1) // layout.chunk_rows)
  num_chunks = bucket(needed) if round_up else needed
  chunked = (num_chunks, layout.chunk_rows)
  starts = _starts(rows, slots, lengths, num_chunks * layout.chunk_rows)
  before = in_row if layout.image_order == "before" else np.zeros_like(in_row)
  tokens, segments, positions = (np.zeros((*chunked, layout.row_length), np.int32) for _ in range(3))
  flat = rows * layout.row_length + starts
  tokens.reshape(-1)[spread(flat + before, texts.lengths)] = texts.values
  places = spread(flat, lengths)
  segments.reshape(-1)[places] = np.repeat(slots + 1, lengths)
  positions.reshape(-1)[places] = places - np.repeat(flat, lengths)
  first = starts if layout.image_order == "before" else starts + texts.lengths
  return PackedItems(
      tokens, segments, positions, (rows * layout.slots + slots).astype(np.int32),
      _pack_images(images, rows, slots, first, layout, chunked) if layout.images else None)


def _pack_images(
    images: Ragged, rows: np.ndarray, slots: np.ndarray, first: np.ndarray, layout: PackedLayout,
    chunked: tuple[int, int]) -> PackedImages:
  """Places of the images, given each item's row, slot and the place of its first image in the row."""
  shape = (*chunked, layout.image_places)
  ids, segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(
      shape, layout.row_length, np.int32)
  # The items of a row take its places one after the other.
  starts = _starts(rows, slots, images.lengths, chunked[0] * chunked[1])
  places = spread(rows * layout.image_places + starts, images.lengths)
  ids.reshape(-1)[places] = images.values
  segments.reshape(-1)[places] = np.repeat(slots + 1, images.lengths)
  if layout.image_order != "apart":
    positions.reshape(-1)[places] = spread(first, images.lengths)
  return PackedImages(ids, segments, positions)


def _starts(rows: np.ndarray, slots: np.ndarray, lengths: np.ndarray, num_rows: int) -> np.ndarray:
  """Where each item begins in its row: behind the items of earlier slots."""
  order = np.lexsort((slots, rows))
  ends = np.cumsum(lengths[order])
  row_starts = np.searchsorted(rows[order], np.arange(num_rows))
  row_base = np.concatenate([[0], ends])[row_starts]
  starts = np.empty(len(lengths), np.int64)
  starts[order] = ends - lengths[order] - row_base[rows[order]]
  return starts
