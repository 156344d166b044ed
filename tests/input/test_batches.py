"""Batches depend on (seed, epoch, step) only, and their positives are those of the labels."""

import dataclasses

import numpy as np

from vixml_jax.input.batches import TrainingQueries, draw_positives, in_batch_positives, make_batch, steps_per_epoch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout
from vixml_jax.ragged import Ragged


def texts(seed, count, longest):
  rng = np.random.default_rng(seed)
  return Ragged.from_rows([rng.integers(1, 1000, rng.integers(1, longest + 1)) for _ in range(count)])


def items_with_images(seed, count, longest, most):
  rng = np.random.default_rng(seed)
  tokens = Ragged.from_rows([rng.integers(1, 1000, rng.integers(2, longest + 1)) for _ in range(count)])
  images = Ragged.from_rows([rng.integers(0, 500, rng.integers(0, most + 1)) for _ in range(count)])
  return Items(tokens, images)


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
  return TrainingQueries(Items.of_texts(texts(2, count, 8)), labels, Items.of_texts(texts(3, 15, 6)), np.ones(15))


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
  first, again, other = (make_batch(data, order, 8, layout, seed=0, epoch=epoch, step=1) for epoch in (2, 2, 3))
  np.testing.assert_array_equal(first.label_ids, again.label_ids)
  np.testing.assert_array_equal(first.items.tokens, again.items.tokens)
  assert (first.label_ids != other.label_ids).any()


def test_modality_dropout_takes_all_images_of_an_item_and_is_a_pure_function_of_the_step():
  items = items_with_images(0, 400, 6, 3)
  data = TrainingQueries(
    items,
    Ragged.from_rows([[i % 15] for i in range(400)]),
    items_with_images(1, 15, 6, 3),
    np.ones(15),
    modality_dropout=0.3,
  )
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
