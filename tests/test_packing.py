"""Packing keeps every item whole, and batches depend on (seed, epoch, step) only."""

import dataclasses

import numpy as np
import pytest

from vixml_jax.input.batches import TrainingQueries, draw_positives, in_batch_positives, make_batch, steps_per_epoch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, bucket, pack
from vixml_jax.input.validation import hold_out
from vixml_jax.ragged import Ragged


def texts(seed, count, longest):
  rng = np.random.default_rng(seed)
  return Ragged.from_rows([rng.integers(1, 1000, rng.integers(1, longest + 1)) for _ in range(count)])


@pytest.mark.parametrize("count,longest,layout", [
    (200, 16, PackedLayout(32, 4)), (37, 32, PackedLayout(32, 8)), (1, 5, PackedLayout(16, 2)),
    (300, 2, PackedLayout(64, 4))])
def test_every_text_is_found_whole_where_its_slot_says(count, longest, layout):
  rows = texts(0, count, longest)
  packed = pack(Items.of_texts(rows), layout)
  assert packed.images is None
  tokens, segments, positions = (
      x.reshape(-1, layout.row_length) for x in (packed.tokens, packed.segments, packed.positions))
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


def test_chunks_come_in_powers_of_two():
  assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_a_text_that_does_not_fit_a_row_is_refused():
  with pytest.raises(ValueError, match="do not fit rows of 16"):
    pack(Items.of_texts(Ragged.from_rows([np.arange(17)])), PackedLayout(16, 1))


def test_in_batch_positives_equal_brute_force_with_repeated_labels():
  rng = np.random.default_rng(0)
  labels = Ragged.from_rows([rng.choice(30, rng.integers(1, 6), replace=False) for _ in range(20)])
  columns = rng.integers(0, 30, 25)
  found = in_batch_positives(labels, columns)
  expected = [[column in labels[i] for column in columns] for i in range(20)]
  np.testing.assert_array_equal(found, expected)


def test_positives_are_drawn_in_proportion_to_their_weights():
  labels = Ragged.from_rows([[0, 2, 3], [1]])
  weights = np.array([1.0, 5.0, 2.0, 7.0])
  rng = np.random.default_rng(0)
  draws = np.stack([draw_positives(labels, weights, rng) for _ in range(4000)])
  np.testing.assert_allclose(np.bincount(draws[:, 0], minlength=4) / 4000, [0.1, 0, 0.2, 0.7], atol=0.03)
  assert (draws[:, 1] == 1).all()


def training_queries(count=21):
  rng = np.random.default_rng(1)
  labels = Ragged.from_rows([rng.choice(15, rng.integers(1, 4), replace=False) for _ in range(count)])
  return TrainingQueries(
      Items.of_texts(texts(2, count, 8)), labels, Items.of_texts(texts(3, 15, 6)), np.ones(15))


def test_an_epoch_reads_every_query_once_and_pads_its_last_batch():
  data, layout = training_queries(), PackedLayout(16, 2)
  order = np.random.default_rng(0).permutation(21)
  assert steps_per_epoch(21, 8) == 3
  seen = []
  for step in range(3):
    batch = make_batch(data, order, 8, layout, seed=0, epoch=0, step=step)
    seen += batch.query_ids[batch.valid].tolist()
    for i in np.flatnonzero(batch.valid):
      assert batch.label_ids[i] in data.labels[batch.query_ids[i]]
      assert batch.positives[i, i]
    assert not batch.positives[~batch.valid].any() and not batch.positives[:, ~batch.valid].any()
  assert sorted(seen) == list(range(21))
  assert batch.valid.sum() == 5


def test_a_batch_is_a_pure_function_of_seed_epoch_and_step():
  data, layout = training_queries(), PackedLayout(16, 2)
  order = np.arange(21)
  first, again, other = (
      make_batch(data, order, 8, layout, seed=0, epoch=epoch, step=1) for epoch in (2, 2, 3))
  np.testing.assert_array_equal(first.label_ids, again.label_ids)
  np.testing.assert_array_equal(first.items.tokens, again.items.tokens)
  assert (first.label_ids != other.label_ids).any()


def test_held_out_queries_take_along_their_reorderings_and_what_differs_by_a_frequent_word():
  rng = np.random.default_rng(0)
  rows = [rng.choice(np.arange(5, 500), 2, replace=False) for _ in range(2000)]
  tokens = Ragged.from_rows(
      [[1, *row, 2] for row in rows] + [[1, *row[::-1], 2] for row in rows] + [[1, *row, 3, 2] for row in rows])
  held_out = hold_out(tokens, 0.1, seed=0)
  np.testing.assert_array_equal(held_out[:2000], held_out[2000:4000])
  np.testing.assert_array_equal(held_out[:2000], held_out[4000:])
  assert 0.07 < held_out.mean() < 0.13
  assert not hold_out(tokens, 0.0, seed=0).any()
  assert (hold_out(tokens, 0.1, seed=1) != held_out).any()


def items_with_images(seed, count, longest, most):
  rng = np.random.default_rng(seed)
  tokens = Ragged.from_rows([rng.integers(1, 1000, rng.integers(2, longest + 1)) for _ in range(count)])
  images = Ragged.from_rows([rng.integers(0, 500, rng.integers(0, most + 1)) for _ in range(count)])
  return Items(tokens, images)


@pytest.mark.parametrize("order", ["before", "after", "apart"])
@pytest.mark.parametrize("images", [1, 3, 5])
def test_every_image_is_found_beside_its_text(order, images):
  layout = PackedLayout(24, 4, images, order)
  items = items_with_images(images, 150, 12, images)
  packed = pack(items, layout)
  tokens, segments, positions = (
      x.reshape(-1, layout.row_length) for x in (packed.tokens, packed.segments, packed.positions))
  ids, owners, places = (x.reshape(-1, layout.image_places) for x in (
      packed.images.rows, packed.images.segments, packed.images.positions))
  for i, slot in enumerate(packed.slots):
    row, place = divmod(int(slot), layout.slots)
    mine = np.flatnonzero(owners[row] == place + 1)
    np.testing.assert_array_equal(ids[row][mine], items.images[i])
    where = np.flatnonzero(segments[row] == place + 1)
    in_row = 0 if order == "apart" else len(mine)
    assert len(where) == len(items.tokens[i]) + in_row
    np.testing.assert_array_equal(positions[row][where], np.arange(len(where)))
    first = in_row if order == "before" else 0
    np.testing.assert_array_equal(tokens[row][where[first:first + len(items.tokens[i])]], items.tokens[i])
    if order == "apart":
      assert (places[row][mine] == layout.row_length).all()
    else:
      start = 0 if order == "before" else len(items.tokens[i])
      np.testing.assert_array_equal(places[row][mine], where[start:start + len(mine)])
  assert (places[owners == 0] == layout.row_length).all()


def test_rows_have_room_for_the_images_of_the_shortest_texts():
  layout = PackedLayout(20, 1, 3)
  items = Items(Ragged.from_rows([[5, 6]] * 40), Ragged.from_rows([[1, 2, 3]] * 40))
  packed = pack(items, layout)
  assert (packed.images.segments > 0).sum() == 120
  assert layout.image_places == 12 == (packed.images.segments > 0).sum(-1).max()


def test_more_images_than_the_layout_has_are_refused():
  items = Items(Ragged.from_rows([[5, 6, 7]]), Ragged.from_rows([[1, 2]]))
  with pytest.raises(ValueError, match="up to 2 images in a layout of 1"):
    pack(items, PackedLayout(16, 1, 1))


def test_the_first_values_of_rows_are_kept():
  rows = Ragged.from_rows([[4, 5, 6], [], [7], [8, 9]])
  kept = rows.first(2)
  assert [row.tolist() for row in kept] == [[4, 5], [], [7], [8, 9]]
  assert rows.first(3) is rows
  assert len(rows.first(0).values) == 0


def test_modality_dropout_takes_all_images_of_an_item_and_is_a_pure_function_of_the_step():
  items = items_with_images(0, 400, 6, 3)
  data = TrainingQueries(
      items, Ragged.from_rows([[i % 15] for i in range(400)]), items_with_images(1, 15, 6, 3), np.ones(15),
      modality_dropout=0.3)
  layout, order = PackedLayout(32, 4, 3), np.arange(400)
  kept = {}
  for step in (0, 1):
    batch = make_batch(data, order, 200, layout, seed=0, epoch=0, step=step)
    found = np.zeros(200, int)
    flat = batch.items.images.segments.reshape(-1, layout.image_places)
    for i, slot in enumerate(batch.items.slots[:200]):
      row, place = divmod(int(slot), layout.slots)
      found[i] = (flat[row] == place + 1).sum()
    had = items.images.lengths[batch.query_ids]
    assert ((found == had) | (found == 0)).all()
    kept[step] = found[had > 0] > 0
    assert 0.6 < kept[step].mean() < 0.8
    again = make_batch(data, order, 200, layout, seed=0, epoch=0, step=step)
    np.testing.assert_array_equal(batch.items.images.segments, again.items.images.segments)
  whole = make_batch(dataclasses.replace(data, modality_dropout=0.0), order, 200, layout, seed=0, epoch=0, step=0)
  images = items.images.take(order[:200])
  assert (whole.items.images.segments > 0).sum() >= len(images.values)
