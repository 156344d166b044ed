"""Packs short items into rows of fixed length, so that little compute is spent on padding tokens.

A row of T tokens has several items, in its slots 1..S. Attention is block-diagonal over slots, positions restart in
each slot, and pooling sums by slot. So a packed item has the embedding that it would have alone.

An item is a sequence of parts: its text, its images, and phrases. The sequence is the same for all items. Phrases are
constants of the layout, which are written into the rows here; texts are tokenized and stored without them.
"""

import dataclasses
from typing import Literal

import numpy as np

from vixml_jax.input.best_fit import assign_rows
from vixml_jax.input.items import Items
from vixml_jax.ragged import Ragged, offsets_of, ranges
from vixml_jax.rounding import next_power_of_two

# The number of slots in a row assumes items of at least this many tokens: shorter ones are too rare to pay for more.
_MIN_ITEM_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class Phrase:
  """Tokens that items share, such as a prefix of the text or of the images, or the token that ends an item.

  Attributes:
    ids: Token ids.
    for_images: Whether the phrase belongs to the images, so that an item without images does not have it.
  """

  ids: tuple[int, ...]
  for_images: bool = False


PromptPart = Literal["text", "images"] | Phrase


def without_images(template: tuple[PromptPart, ...]) -> tuple[PromptPart, ...]:
  """Returns the parts of an item without images, which every item has if images are not tokens."""
  return tuple(part for part in template if part != "images" and not (isinstance(part, Phrase) and part.for_images))


@dataclasses.dataclass(frozen=True)
class PackedLayout:
  """The static shape of packed rows, and the parts of an item.

  Attributes:
    row_length: T, the number of tokens in a row.
    chunk_rows: R, the number of rows that are encoded at a time, over the whole mesh.
    images: I, the maximum number of images of an item; 0 for texts only.
    template: Parts of an item in order. With "images", images are tokens of the row (early fusion); without, they are
      separate from the tokens (late fusion).
    special_tokens: Number of tokens that the tokenizer adds to every text: 2 for BERT, 1 for Llama, 0 for Qwen.
  """

  row_length: int
  chunk_rows: int
  images: int = 0
  template: tuple[PromptPart, ...] = ("images", "text")
  special_tokens: int = 2

  def __post_init__(self) -> None:
    words = [part for part in self.template if not isinstance(part, Phrase)]
    if set(words) - {"text", "images"} or len(set(words)) < len(words):
      raise ValueError(
        f"template {self.template}: a part must be a Phrase, 'text' or 'images', the last two at most once"
      )

  @property
  def slots(self) -> int:
    """S, the maximum number of items in a row.

    It is the number of items that fill a row if each has one token besides the shared ones, or three tokens if that is
    more.
    """
    return max(self.row_length // max(self._shared(images=False) + 1, _MIN_ITEM_TOKENS), 1)

  @property
  def image_places(self) -> int:
    """J, the maximum number of images in a row.

    It is the number of images if the texts are empty and all items but one have I images.
    """
    apart = self.slots * self.images
    if "images" not in self.template or not self.images:
      return apart
    shared = self._shared(images=True)
    full, left = divmod(self.row_length, self.images + shared)
    return min(full * self.images + max(left - shared, 0), apart)

  def item_lengths(self, items: Items) -> np.ndarray:
    """Returns the number of tokens of each item, images and phrases included, int64 [items]."""
    return sum((_sizes(part, items) for part in self.template), np.zeros(len(items), np.int64))

  def longest(self, max_length: int) -> int:
    """Returns the maximum number of tokens of an item.

    Args:
      max_length: Maximum number of tokens of its text, special tokens included.
    """
    text = max_length - self.special_tokens if "text" in self.template else 0
    images = self.images if "images" in self.template else 0
    return self._shared(images=self.images > 0) + text + images

  def _shared(self, images: bool) -> int:
    """Returns the number of tokens that all items with (or without) images share: phrases and special tokens."""
    parts = self.template if images else without_images(self.template)
    phrases = sum(len(part.ids) for part in parts if isinstance(part, Phrase))
    return phrases + (self.special_tokens if "text" in parts else 0)


@dataclasses.dataclass(frozen=True)
class PackedImages:
  """The images of packed items, J places per row.

  Attributes:
    rows: Row of the image in the image features, int32 [chunks, R, J]; 0 for an empty place.
    segments: Slot 1..S of the item of the image, int32 [chunks, R, J]; 0 for an empty place.
    positions: Index of the image among the tokens of its row, int32 [chunks, R, J]; T if the image is not a token.
  """

  rows: np.ndarray
  segments: np.ndarray
  positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackedItems:
  """Items in chunks of rows.

  Attributes:
    tokens: Token ids, int32 [chunks, R, T]; 0 for an image and for padding.
    segments: Slot 1..S of each token within its row, int32 [chunks, R, T]; 0 for padding.
    positions: Position of each token within its item, image tokens counted, int32 [chunks, R, T].
    slots: Index of the pooled vector of each item in the flattened [chunks * R * S], int32 [items]. An item without
      any token also has a slot, whose vector is zero.
    images: The images; None for a layout of texts only.
  """

  tokens: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  slots: np.ndarray
  images: PackedImages | None

  @property
  def filled(self) -> np.ndarray:
    """Which chunks have any item, bool [chunks]."""
    return np.asarray((self.segments > 0).any(axis=(1, 2)))

  @property
  def num_tokens(self) -> int:
    """Number of tokens of all items, image tokens included, padding excluded."""
    return int((self.segments > 0).sum())

  def with_chunk_rows(self, rows: int) -> "PackedItems":
    """Returns the same rows in chunks of `rows` rows. Empty rows fill the last chunk.

    Items that were packed with `chunk_rows=1` and `round_up=False` equal those that are packed with `chunk_rows=rows`
    and `round_up=False`. So items can be packed once, before the size of a chunk is chosen.
    """
    shape = (-(-self.tokens.shape[0] * self.tokens.shape[1] // rows), rows)
    arrays = {name: _rechunk(getattr(self, name), shape, 0) for name in ("tokens", "segments", "positions")}
    images = self.images and PackedImages(
      _rechunk(self.images.rows, shape, 0),
      _rechunk(self.images.segments, shape, 0),
      _rechunk(self.images.positions, shape, self.tokens.shape[2]),
    )
    return dataclasses.replace(self, **arrays, images=images)


def _rechunk(array: np.ndarray, shape: tuple[int, int], filling: int) -> np.ndarray:
  """Reshapes [chunks, R, width] to [*shape, width], with rows of `filling` at the end."""
  result = np.full((*shape, array.shape[2]), filling, array.dtype)
  result.reshape(-1)[: array.size] = array.reshape(-1)
  return result


def pack(items: Items, layout: PackedLayout, round_up: bool = True) -> PackedItems:
  """Packs items into rows.

  >>> items = Items.of_texts(Ragged.from_rows([[11, 12, 13], [21, 22], [31, 32, 33, 34]]))
  >>> packed = pack(items, PackedLayout(row_length=6, chunk_rows=2))
  >>> packed.tokens.tolist()
  [[[31, 32, 33, 34, 21, 22], [11, 12, 13, 0, 0, 0]]]
  >>> packed.segments.tolist()
  [[[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]]
  >>> packed.positions.tolist()
  [[[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]]
  >>> packed.slots.tolist()  # With S = 2 slots per row.
  [2, 1, 0]

  Args:
    items: Items with at most `layout.images` images, whose parts together fit a row. If a text and images are both
      tokens, the text must have at least `layout.special_tokens` tokens.
    layout: Shape of the rows, and the parts of an item.
    round_up: Whether to add empty chunks until their number is a power of two. Programs skip empty chunks.

  Raises:
    ValueError: An item is longer than a row or has too many images, or a text lacks its special tokens.
  """
  sizes = [_sizes(part, items) for part in layout.template]
  lengths = sum(sizes, np.zeros(len(items), np.int64))
  _check(items, lengths, layout)
  rows, slots, starts = assign_rows(lengths, layout.row_length, layout.slots)
  needed = -(-int(rows.max(initial=-1) + 1) // layout.chunk_rows)
  num_chunks = next_power_of_two(needed) if round_up else needed
  chunked = (num_chunks, layout.chunk_rows)
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


@dataclasses.dataclass(frozen=True)
class WholeItems:
  """Items one after the other, without rows.

  Attributes:
    tokens: Token ids of each item, phrases included; 0 for an image.
    images: Positions of each item's images among its tokens, int64.
  """

  tokens: Ragged
  images: Ragged


def whole_items(items: Items, layout: PackedLayout) -> WholeItems:
  """Returns the tokens that packed rows have for each item.

  >>> items = Items(Ragged.from_rows([[11, 12], [21, 22, 23]]), Ragged.from_rows([[5], []]))
  >>> whole = whole_items(items, PackedLayout(row_length=8, chunk_rows=1, images=1))
  >>> [row.tolist() for row in whole.tokens], [row.tolist() for row in whole.images]
  ([[0, 11, 12], [21, 22, 23]], [[0], []])

  Args:
    items: Items as for `pack`.
    layout: The parts of an item, with images as tokens if there are any.

  Raises:
    ValueError: As in `pack`.
  """
  sizes = [_sizes(part, items) for part in layout.template]
  lengths = sum(sizes, np.zeros(len(items), np.int64))
  _check(items, lengths, layout)
  first = offsets_of(lengths)
  tokens = np.zeros(first[-1], np.int32)
  first_images = _write_tokens(tokens, first[:-1], sizes, items.tokens, layout) - first[:-1]
  counts = items.images.lengths
  return WholeItems(Ragged.of_lengths(tokens, lengths), Ragged.of_lengths(ranges(first_images, counts), counts))


def _sizes(part: PromptPart, items: Items) -> np.ndarray:
  """Returns the number of tokens of a part in each item, int64 [items]."""
  if isinstance(part, Phrase):
    return len(part.ids) * ((items.images.lengths > 0) | (not part.for_images))
  return items.tokens.lengths if part == "text" else items.images.lengths


def _check(items: Items, lengths: np.ndarray, layout: PackedLayout) -> None:
  """Checks the assumptions of `PackedLayout.slots` and `PackedLayout.image_places`."""
  texts, images = items.tokens.lengths, items.images.lengths
  if images.max(initial=0) > layout.images:
    raise ValueError(f"an item has {images.max()} images, but the layout allows {layout.images}")
  if lengths.max(initial=0) > layout.row_length:
    raise ValueError(f"an item has {lengths.max()} tokens and does not fit rows of {layout.row_length}")
  if set(layout.template) >= {"text", "images"} and (texts[images > 0] < layout.special_tokens).any():
    raise ValueError(f"a text with images has fewer than the {layout.special_tokens} special tokens of every text")


def _write_tokens(
  tokens: np.ndarray, first: np.ndarray, sizes: list[np.ndarray], texts: Ragged, layout: PackedLayout
) -> np.ndarray:
  """Writes texts and phrases into the flattened rows.

  Args:
    tokens: Flattened rows, written in place.
    first: Index of the first token of each item in the flattened rows, int64 [items].
    sizes: Number of tokens of each part of the template in each item, int64 [items] each.
    texts: Token ids of the texts.
    layout: Parts of an item.

  Returns:
    Index of the first image of each item, int64 [items]; without meaning if images are not tokens.
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
  """Packs the images, given the row and the slot of each item and the position of its first image in the row."""
  shape = (*chunked, layout.image_places)
  ids, segments, positions = (
    np.zeros(shape, np.int32),
    np.zeros(shape, np.int32),
    np.full(shape, layout.row_length, np.int32),
  )
  # The items of a row use its places in the order of their slots.
  starts = _image_starts(rows, slots, images.lengths, layout)
  places = ranges(rows * layout.image_places + starts, images.lengths)
  ids.reshape(-1)[places] = images.values
  segments.reshape(-1)[places] = np.repeat(slots + 1, images.lengths)
  if "images" in layout.template:
    positions.reshape(-1)[places] = ranges(first, images.lengths)
  return PackedImages(ids, segments, positions)


def _image_starts(rows: np.ndarray, slots: np.ndarray, counts: np.ndarray, layout: PackedLayout) -> np.ndarray:
  """Returns the number of images of the items in earlier slots of each item's row, int64 [items]."""
  by_slot = np.zeros((int(rows.max(initial=-1)) + 1, layout.slots), np.int64)
  by_slot[rows, slots] = counts
  return np.cumsum(by_slot, axis=1)[rows, slots] - counts
