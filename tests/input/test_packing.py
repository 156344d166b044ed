"""Packing keeps every item whole: its text, its images and the phrases around them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, Phrase, pack, without_images
from vixml_jax.models.pooling import pool_segments
from vixml_jax.ragged import Ragged


def texts(seed, count, longest):
  rng = np.random.default_rng(seed)
  return Ragged.from_rows([rng.integers(1, 1000, rng.integers(1, longest + 1)) for _ in range(count)])


@pytest.mark.parametrize(
  "count,longest,layout",
  [
    (200, 16, PackedLayout(32, 4)),
    (37, 32, PackedLayout(32, 8)),
    (1, 5, PackedLayout(16, 2)),
    (300, 2, PackedLayout(64, 4)),
  ],
)
def test_every_text_is_found_whole_in_its_slot(count, longest, layout):
  rows = texts(0, count, longest)
  packed = pack(Items.of_texts(rows), layout)
  assert packed.images is None
  tokens, segments, positions = (
    x.reshape(-1, layout.row_length) for x in (packed.tokens, packed.segments, packed.positions)
  )
  for i, slot in enumerate(packed.slots):
    row, place = divmod(int(slot), layout.slots)
    where = np.flatnonzero(segments[row] == place + 1)
    np.testing.assert_array_equal(tokens[row][where], rows[i])
    np.testing.assert_array_equal(positions[row][where], np.arange(len(rows[i])))
    assert (np.diff(where) == 1).all()
  assert len(np.unique(packed.slots)) == count
  assert packed.num_tokens == len(rows.values)
  assert segments.max() <= layout.slots


def test_packing_wastes_little():
  rows = texts(1, 2000, 32)
  packed = pack(Items.of_texts(rows), PackedLayout(64, 1), round_up=False)
  used_rows = packed.tokens.shape[0]
  assert used_rows <= 1.03 * len(rows.values) / 64


def test_a_text_that_does_not_fit_a_row_is_refused():
  with pytest.raises(ValueError, match="an item has 17 tokens and does not fit rows of 16"):
    pack(Items.of_texts(Ragged.from_rows([np.arange(17)])), PackedLayout(16, 1))


def items_with_images(seed, count, longest, most):
  rng = np.random.default_rng(seed)
  tokens = Ragged.from_rows([rng.integers(1, 1000, rng.integers(2, longest + 1)) for _ in range(count)])
  images = Ragged.from_rows([rng.integers(0, 500, rng.integers(0, most + 1)) for _ in range(count)])
  return Items(tokens, images)


TEMPLATES = {"before": ("images", "text"), "after": ("text", "images"), "apart": ("text",)}


@pytest.mark.parametrize("order", TEMPLATES)
@pytest.mark.parametrize("images", [1, 3, 5])
def test_every_image_is_found_next_to_its_text(order, images):
  layout = PackedLayout(24, 4, images, TEMPLATES[order])
  items = items_with_images(images, 150, 12, images)
  packed = pack(items, layout)
  tokens, segments, positions = (
    x.reshape(-1, layout.row_length) for x in (packed.tokens, packed.segments, packed.positions)
  )
  ids, owners, places = (
    x.reshape(-1, layout.image_places) for x in (packed.images.rows, packed.images.segments, packed.images.positions)
  )
  for i, slot in enumerate(packed.slots):
    row, place = divmod(int(slot), layout.slots)
    mine = np.flatnonzero(owners[row] == place + 1)
    np.testing.assert_array_equal(ids[row][mine], items.images[i])
    where = np.flatnonzero(segments[row] == place + 1)
    in_row = 0 if order == "apart" else len(mine)
    assert len(where) == len(items.tokens[i]) + in_row
    np.testing.assert_array_equal(positions[row][where], np.arange(len(where)))
    first = in_row if order == "before" else 0
    np.testing.assert_array_equal(tokens[row][where[first : first + len(items.tokens[i])]], items.tokens[i])
    if order == "apart":
      assert (places[row][mine] == layout.row_length).all()
    else:
      start = 0 if order == "before" else len(items.tokens[i])
      np.testing.assert_array_equal(places[row][mine], where[start : start + len(mine)])
  assert (places[owners == 0] == layout.row_length).all()


def test_rows_have_room_for_the_images_of_the_shortest_texts():
  layout = PackedLayout(20, 1, 3)
  items = Items(Ragged.from_rows([[5, 6]] * 40), Ragged.from_rows([[1, 2, 3]] * 40))
  packed = pack(items, layout)
  assert (packed.images.segments > 0).sum() == 120
  assert layout.image_places == 12 == (packed.images.segments > 0).sum(-1).max()


def test_more_images_than_the_layout_has_are_refused():
  items = Items(Ragged.from_rows([[5, 6, 7]]), Ragged.from_rows([[1, 2]]))
  with pytest.raises(ValueError, match="an item has 2 images, but the layout allows 1"):
    pack(items, PackedLayout(16, 1, 1))


FOR_TEXT, FOR_IMAGES, EOS = Phrase((900, 901, 902)), Phrase((910, 911), for_images=True), Phrase((950,))
FULL = (FOR_TEXT, "text", FOR_IMAGES, "images", EOS)
# The rows of the ablation of prompts in ViXML (arXiv 2511.13189).
PROMPTS = [
  ("text",),
  (FOR_TEXT, "text"),
  (FOR_TEXT, "text", EOS),
  ("images", "text", EOS),
  ("text", "images", EOS),
  (FOR_IMAGES, "images", FOR_TEXT, "text", EOS),
  FULL,
]


def image(row):
  """The number by which `laid_out` and `expected` represent an image among tokens."""
  return -1 - int(row)


def expected(template, text, images):
  """One item, part by part."""
  parts = []
  for part in template:
    if part == "text":
      parts += text.tolist()
    elif part == "images":
      parts += [image(row) for row in images]
    elif len(images) or not part.for_images:
      parts += part.ids
  return parts


def laid_out(packed, layout):
  """Yields the tokens of every item in its row, its positions, and its images."""
  tokens, segments, positions = (
    x.reshape(-1, layout.row_length).copy() for x in (packed.tokens, packed.segments, packed.positions)
  )
  assert (tokens[segments == 0] == 0).all()
  shape = (len(tokens), layout.image_places if layout.images else 0)
  ids, owners, places = (
    (np.zeros(shape, int),) * 3
    if packed.images is None
    else (x.reshape(shape) for x in (packed.images.rows, packed.images.segments, packed.images.positions))
  )
  for row, place in zip(*np.nonzero(owners), strict=True):
    at = places[row, place]
    if at < layout.row_length:
      assert tokens[row, at] == 0 and segments[row, at] == owners[row, place]
      tokens[row, at] = image(ids[row, place])
  for slot in packed.slots:
    row, place = divmod(int(slot), layout.slots)
    where = np.flatnonzero(segments[row] == place + 1)
    assert (np.diff(where) == 1).all()
    yield tokens[row][where].tolist(), positions[row][where].tolist(), ids[row][owners[row] == place + 1].tolist()


def random_template(rng):
  """A random sequence of parts, with or without images and text."""
  parts = [part for part in ("text", "images") if rng.random() < 0.8]
  parts += [
    Phrase(tuple(rng.integers(900, 999, rng.integers(1, 4)).tolist()), for_images=rng.random() < 0.5)
    for _ in range(rng.integers(0, 5))
  ]
  rng.shuffle(parts)
  return tuple(parts)


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("special_tokens", [0, 1, 2])
@pytest.mark.parametrize("template", [*PROMPTS, *range(8)])
def test_every_item_is_its_template_s_parts_in_order(template, special_tokens, most):
  rng = np.random.default_rng(0 if isinstance(template, tuple) else template)
  if isinstance(template, int):
    template = random_template(rng)
  layout = PackedLayout(36, 4, most, template, special_tokens)
  texts = Ragged.from_rows([rng.integers(1, 900, special_tokens + max(rng.integers(-3, 9), 0)) for _ in range(150)])
  images = Ragged.from_rows([rng.integers(0, 500, rng.integers(0, most + 1)) for _ in range(150)])
  packed = pack(Items(texts, images), layout)
  wanted = [expected(template, text, rows) for text, rows in zip(texts, images, strict=True)]
  for (item, positions, owned), whole, rows in zip(laid_out(packed, layout), wanted, images, strict=True):
    assert item == whole
    assert positions == list(range(len(whole)))
    assert owned == rows.tolist()
  assert packed.num_tokens == sum(map(len, wanted))
  assert max(map(len, wanted)) <= layout.longest(special_tokens + 8)
  assert len(np.unique(packed.slots)) == 150


def most_images_by_trying(layout):
  """The maximum number of images in a row, by trying all numbers of items with I images and one with fewer."""

  def length(images):
    return len(expected(layout.template, np.zeros(layout.special_tokens), [0] * images))

  counts = [0]
  for full in range(layout.slots):
    for rest in range(layout.images + 1):
      if full * length(layout.images) + length(rest) <= layout.row_length:
        counts.append(full * layout.images + rest)
  return max(counts)


@pytest.mark.parametrize("special_tokens", [0, 1, 2])
@pytest.mark.parametrize("template", [("images", "text"), FULL, ("text", "images", EOS)])
def test_rows_have_exactly_as_many_image_places_as_can_be_needed(template, special_tokens):
  for row_length in range(3, 60):
    layout = PackedLayout(row_length, 1, 3, template, special_tokens)
    assert layout.image_places == most_images_by_trying(layout)


def test_the_longest_item_has_the_longest_text_all_phrases_and_all_images():
  assert PackedLayout(64, 1, 3, FULL, 0).longest(32) == 3 + 32 + 2 + 3 + 1
  assert PackedLayout(64, 1, 0, FULL, 0).longest(32) == 3 + 32 + 1
  assert PackedLayout(64, 1, 3, ("text",)).longest(32) == 32
  assert PackedLayout(64, 1, 3).longest(32) == 35


@pytest.mark.parametrize("layout", [PackedLayout(24, 1), PackedLayout(24, 1, 3), PackedLayout(40, 1, 3, FULL)])
@pytest.mark.parametrize("count", [0, 1, 90])
def test_items_packed_once_get_chunks_of_any_size(layout, count):
  items = items_with_images(5, count, 12, layout.images)
  once = pack(items, layout, round_up=False)
  for rows in (1, 4, 7, 1000):
    found = once.with_chunk_rows(rows)
    wanted = pack(items, dataclasses.replace(layout, chunk_rows=rows), round_up=False)
    assert found.tokens.shape == wanted.tokens.shape
    assert (found.images is None) == (wanted.images is None)
    for one, other in zip(
      jax.tree.leaves(dataclasses.asdict(found)), jax.tree.leaves(dataclasses.asdict(wanted)), strict=True
    ):
      assert one.dtype == other.dtype
      np.testing.assert_array_equal(one, other)


def test_rows_of_short_prompted_items_are_full_before_their_slots_are():
  layout = PackedLayout(60, 1, 3, FULL, 0)
  packed = pack(Items.of_texts(Ragged.from_rows([[7]] * 36)), layout, round_up=False)
  assert layout.slots == 12
  assert (packed.segments > 0).all() and len(packed.tokens) == 3


def test_template_without_images_has_neither_images_nor_their_phrase():
  assert without_images(FULL) == (FOR_TEXT, "text", EOS)


def test_an_item_without_tokens_has_its_own_slot_and_the_zero_vector():
  layout = PackedLayout(8, 4, 2, ("text", "images"), 0)
  rows = [[5, 6, 7], [], [8] * 8, [], [9]]
  items = Items(Ragged.from_rows(rows), Ragged.from_rows([[], [], [], [3], []]))
  packed = pack(items, layout)
  hidden = np.random.default_rng(0).normal(size=(*packed.tokens.shape[1:], 4)).astype(np.float32) + 5
  segments = packed.segments[0]
  pooled = pool_segments(jnp.asarray(hidden), jnp.asarray(segments), layout.slots)
  pooled = np.asarray(pooled).reshape(-1, 4)[packed.slots]
  assert len(np.unique(packed.slots)) == 5
  assert (pooled[1] == 0).all() and (pooled[[0, 2, 3, 4]] > 1).all()
  flat = hidden.reshape(-1, 4)[segments.reshape(-1) > 0]
  np.testing.assert_allclose((pooled * np.array([[3], [0], [8], [1], [1]])).sum(0), flat.sum(0), rtol=1e-5)


def test_a_text_without_its_special_tokens_cannot_have_images():
  items = Items(Ragged.from_rows([[5]]), Ragged.from_rows([[1]]))
  with pytest.raises(ValueError, match="fewer than the 2 special tokens"):
    pack(items, PackedLayout(16, 1, 1))


@pytest.mark.parametrize("template", ["before", ("text", "text"), ("text", "images", "images")])
def test_a_template_of_unknown_or_repeated_parts_is_refused(template):
  with pytest.raises(ValueError, match="a part must be a Phrase"):
    PackedLayout(16, 1, 1, template)
