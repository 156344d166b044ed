"""Packs short items end to end into fixed rows, so that no compute goes to padding tokens.

A row of T tokens holds several items ("slots" 1..S). Attention is block-diagonal over slots, positions
restart in each, and pooling sums by slot; so a packed item gets the embedding that it would get alone.

An item is a sequence of parts, the same for all: its text, its images, and phrases that every item shares. Phrases
are constants of the layout, written into the rows here; no text is tokenized or stored with them.
"""

import dataclasses
from typing import Literal

import numpy as np

from vixml_jax.input.items import Items
from vixml_jax.ragged import Ragged, ranges
from vixml_jax.rounding import next_power_of_two

_SHORTEST = 3  # Tokens of an item, as slots reckon: shorter ones are too few to give every row more slots.


@dataclasses.dataclass(frozen=True)
class Phrase:
  """Tokens that items share: a prefix of their texts or images, or what ends an item.

  Attributes:
    ids: token ids.
    beside_images: whether it belongs to the images, and is left out of an item that has none.
  """

  ids: tuple[int, ...]
  beside_images: bool = False


PromptPart = Literal["text", "images"] | Phrase


def without_images(template: tuple[PromptPart, ...]) -> tuple[PromptPart, ...]:
  """The parts of an item without images; of every item where images do not stand among the tokens."""
  return tuple(part for part in template if part != "images" and not (isinstance(part, Phrase) and part.beside_images))


@dataclasses.dataclass(frozen=True)
class PackedLayout:
  """The static shape of packed rows.

  Attributes:
    row_length: T, tokens in a row.
    chunk_rows: rows that are encoded at a time, over the whole mesh.
    images: I, the most images an item has; 0 for texts only.
    template: the parts of an item in their order. "images" are tokens of the row; where the template lacks them,
      they stand apart from the tokens, for late fusion.
    special_tokens: that the tokenizer adds to every text: 2 for BERT, 1 for Llama, 0 for Qwen.
  """

  row_length: int
  chunk_rows: int
  images: int = 0
  template: tuple[PromptPart, ...] = ("images", "text")
  special_tokens: int = 2

  def __post_init__(self):
    words = [part for part in self.template if not isinstance(part, Phrase)]
    if set(words) - {"text", "images"} or len(set(words)) < len(words):
      raise ValueError(f"template {self.template}: a part is a Phrase, or 'text' or 'images', which stand once at most")

  @property
  def slots(self) -> int:
    """S, the most items a row may hold: those of one token besides the shared ones, or of three tokens, fill it."""
    return max(self.row_length // max(self._shared(images=False) + 1, _SHORTEST), 1)

  @property
  def image_places(self) -> int:
    """J, the most images that fit a row: those of items with I images and an empty text, and of one with fewer."""
    apart = self.slots * self.images
    if "images" not in self.template or not self.images:
      return apart
    shared = self._shared(images=True)
    full, left = divmod(self.row_length, self.images + shared)
    return min(full * self.images + max(left - shared, 0), apart)

  def longest(self, max_length: int) -> int:
    """The most tokens of an item whose text has at most `max_length`, special ones included."""
    text = max_length - self.special_tokens if "text" in self.template else 0
    images = self.images if "images" in self.template else 0
    return self._shared(images=self.images > 0) + text + images

  def _shared(self, images: bool) -> int:
    """Tokens of an item with or without images that are the same for all: phrases, and special ones of a text."""
    parts = self.template if images else without_images(self.template)
    phrases = sum(len(part.ids) for part in parts if isinstance(part, Phrase))
    return phrases + (self.special_tokens if "text" in parts else 0)


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
    slots: int32 [items], where each item's pooled vector lies in the flattened [chunks * R * S]; an item of no token
      at all has a slot too, whose vector is zero.
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
    lengths: int [items], each 0 to `row_length`.
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


def pack(items: Items, layout: PackedLayout, round_up: bool = True) -> PackedItems:
  """Packs items into rows.

  Args:
    items: texts of any length, of `layout.special_tokens` or more where there are images, with at most
      `layout.images` images; all parts of an item together fit a row.
    layout: shape of the rows, and the parts of an item.
    round_up: fill up with empty chunks to a power of two; they are skipped when the program runs.

  Raises:
    ValueError: if a text lacks its special tokens, or an item is longer than a row or has too many images.
  """
  sizes = [_sizes(part, items) for part in layout.template]
  lengths = sum(sizes, np.zeros(len(items), np.int64))
  _check(items, lengths, layout)
  rows, slots = assign_rows(lengths, layout.row_length, layout.slots)
  needed = -(-int(rows.max(initial=-1) + 1) // layout.chunk_rows)
  num_chunks = next_power_of_two(needed) if round_up else needed
  chunked = (num_chunks, layout.chunk_rows)
  starts = _starts(rows, slots, lengths, num_chunks * layout.chunk_rows)
  tokens, segments, positions = (np.zeros((*chunked, layout.row_length), np.int32) for _ in range(3))
  first = rows * layout.row_length + starts
  places = ranges(first, lengths)
  segments.reshape(-1)[places] = np.repeat(slots + 1, lengths)
  positions.reshape(-1)[places] = places - np.repeat(first, lengths)
  first_images = _write_tokens(tokens.reshape(-1), first, sizes, items.tokens, layout) - rows * layout.row_length
  return PackedItems(
    tokens,
    segments,
    positions,
    (rows * layout.slots + slots).astype(np.int32),
    _pack_images(items.images, rows, slots, first_images, layout, chunked) if layout.images else None,
  )


def _sizes(part: PromptPart, items: Items) -> np.ndarray:
  """int64 [items], the tokens that a part takes in each item."""
  if isinstance(part, Phrase):
    return len(part.ids) * ((items.images.lengths > 0) | (not part.beside_images))
  return items.tokens.lengths if part == "text" else items.images.lengths


def _check(items: Items, lengths: np.ndarray, layout: PackedLayout) -> None:
  """What the layout's bounds rest on."""
  texts, images = items.tokens.lengths, items.images.lengths
  if images.max(initial=0) > layout.images:
    raise ValueError(f"items of up to {images.max()} images in a layout of {layout.images}")
  if lengths.max(initial=0) > layout.row_length:
    raise ValueError(f"items of {lengths.min()}..{lengths.max()} tokens do not fit rows of {layout.row_length}")
  if set(layout.template) >= {"text", "images"} and (texts[images > 0] < layout.special_tokens).any():
    raise ValueError(f"a text with images has fewer than the {layout.special_tokens} special tokens of every text")


def _write_tokens(
  tokens: np.ndarray, first: np.ndarray, sizes: list[np.ndarray], texts: Ragged, layout: PackedLayout
) -> np.ndarray:
  """Writes texts and phrases into the flat rows, from each item's place `first` on.

  Returns:
    int64 [items], the place of each item's first image; of no meaning where the images are apart.
  """
  first_images = first
  for part, size in zip(layout.template, sizes, strict=True):
    if isinstance(part, Phrase):
      tokens[first[size > 0, None] + np.arange(len(part.ids))] = part.ids
    elif part == "text":
      tokens[ranges(first, size)] = texts.values
    else:
      first_images = first
    first = first + size
  return first_images


def _pack_images(
  images: Ragged, rows: np.ndarray, slots: np.ndarray, first: np.ndarray, layout: PackedLayout, chunked: tuple[int, int]
) -> PackedImages:
  """Places of the images, given each item's row, slot and the place of its first image in the row."""
  shape = (*chunked, layout.image_places)
  ids, segments, positions = (
    np.zeros(shape, np.int32),
    np.zeros(shape, np.int32),
    np.full(shape, layout.row_length, np.int32),
  )
  # The items of a row take its places one after the other.
  starts = _starts(rows, slots, images.lengths, chunked[0] * chunked[1])
  places = ranges(rows * layout.image_places + starts, images.lengths)
  ids.reshape(-1)[places] = images.values
  segments.reshape(-1)[places] = np.repeat(slots + 1, images.lengths)
  if "images" in layout.template:
    positions.reshape(-1)[places] = ranges(first, images.lengths)
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
