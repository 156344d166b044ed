"""Packing keeps every text whole, and batches depend on (seed, epoch, step) only."""

import numpy as np
import pytest

from vixml_jax.input.batches import TrainingQueries, draw_positives, in_batch_positives, make_batch, steps_per_epoch
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
  packed = pack(rows, layout)
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
  packed = pack(rows, PackedLayout(64, 1), round_up=False)
  used_rows = packed.tokens.shape[0]
  assert used_rows <= 1.03 * len(rows.values) / 64


def test_chunks_come_in_powers_of_two():
  assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_a_text_that_does_not_fit_a_row_is_refused():
  with pytest.raises(ValueError, match="do not fit rows of 16"):
    pack(Ragged.from_rows([np.arange(17)]), PackedLayout(16, 1))


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
  return TrainingQueries(texts(2, count, 8), labels, texts(3, 15, 6), np.ones(15))


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
  np.testing.assert_array_equal(first.texts.tokens, again.texts.tokens)
  assert (first.label_ids != other.label_ids).any()


def test_held_out_queries_take_their_reorderings_along():
  rng = np.random.default_rng(0)
  rows = [rng.integers(5, 500, 4) for _ in range(2000)]
  tokens = Ragged.from_rows(rows + [row[::-1] for row in rows])
  held_out = hold_out(tokens, 0.1, seed=0)
  np.testing.assert_array_equal(held_out[:2000], held_out[2000:])
  assert 0.07 < held_out.mean() < 0.13
  assert not hold_out(tokens, 0.0, seed=0).any()
  assert (hold_out(tokens, 0.1, seed=1) != held_out).any()
