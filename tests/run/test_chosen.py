"""Tests of the values that are chosen where a config leaves a key open."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.miniature_runs import load_config, miniature_config
from vixml_jax.input.batches import TrainingQueries, make_batch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout
from vixml_jax.ragged import Ragged
from vixml_jax.run import chosen, configuration
from vixml_jax.run.setup import set_up_run, write_config


@pytest.fixture
def config(tmp_path):
  config = miniature_config(tmp_path)
  config.encoder.dtype, config.train.row_length, config.train.chunk_rows = "auto", 0, 0
  return config


def random_items(rng, count):
  lengths = rng.integers(2, 17, count)
  return Items.of_texts(Ragged.of_lengths(np.ones(lengths.sum(), np.int32), lengths))


def test_the_dtype_suits_the_platform(config):
  found = {platform: chosen.with_dtype(config, platform).encoder.dtype for platform in ("cpu", "gpu", "tpu")}
  assert found == {"cpu": "float32", "gpu": "bfloat16", "tpu": "bfloat16"}
  config.encoder.dtype = "float16"
  assert chosen.with_dtype(config, "cpu").encoder.dtype == "float16", "a dtype that was asked for must stay"


@pytest.mark.parametrize(
  "longest,platform,length", [(32, "cpu", 64), (35, "cpu", 80), (32, "gpu", 128), (128, "tpu", 128), (129, "tpu", 256)]
)
def test_rows_hold_two_items_on_a_cpu_and_fill_tiles_elsewhere(config, longest, platform, length):
  assert chosen.with_row_length(config, longest, platform).train.row_length == length
  config.train.row_length = 40
  assert chosen.with_row_length(config, longest, platform).train.row_length == 40


def test_training_on_a_cpu_has_a_time_limit(config):
  config.train.minutes = -1
  assert {name: chosen.with_minutes(config, name).train.minutes for name in ("cpu", "gpu")} == {"cpu": 10, "gpu": 0}
  config.train.minutes = 3
  assert chosen.with_minutes(config, "cpu").train.minutes == 3


@pytest.mark.parametrize("epochs,labels,budget,weight", [(1, 1000, 1e9, 0.3), (1, 1000, 1e6, 0), (0, 1000, 1e9, 0)])
def test_classifiers_are_trained_where_they_fit_the_memory(config, epochs, labels, budget, weight):
  config.train.update(dict(classifier_weight=-1, epochs=epochs))
  assert chosen.with_classifier_weight(config, labels, budget).train.classifier_weight == weight
  config.train.classifier_weight = 0.7
  assert chosen.with_classifier_weight(config, labels, budget).train.classifier_weight == 0.7


def with_chunk_rows(config, queries, labels, positives, layout, **options):
  options = {"unit": 4, "budget": 1e12} | options
  return chosen.with_chunk_rows(config, queries, positives, labels, layout, **options).train.chunk_rows


def test_a_chunk_holds_every_batch_of_an_epoch(config):
  rng = np.random.default_rng(0)
  queries, labels = random_items(rng, 2000), random_items(rng, 300)
  positives = Ragged.of_lengths(rng.integers(0, 300, 4000).astype(np.int32), np.full(2000, 2))
  config.train.update(dict(batch_size=200, row_length=32))
  config.encoder.dtype = "float32"
  layout = PackedLayout(row_length=32, chunk_rows=1)
  rows = with_chunk_rows(config, queries, labels, positives, layout)
  assert rows % 4 == 0
  data = TrainingQueries(queries, positives, labels, np.ones(300))
  layout = dataclasses.replace(layout, chunk_rows=rows)
  order = rng.permutation(2000)
  batches = [make_batch(data, order, 200, layout, seed=0, epoch=0, step=step) for step in range(10)]
  assert [len(batch.items.tokens) for batch in batches] == [1] * 10
  filled = np.mean([np.count_nonzero(batch.items.segments) for batch in batches]) / (32 * rows)
  assert filled > 0.85, "most of a chunk must be tokens"


def test_a_batch_is_divided_until_its_activations_fit_the_memory(config):
  rng = np.random.default_rng(0)
  queries, labels = random_items(rng, 500), random_items(rng, 300)
  positives = Ragged.of_lengths(rng.integers(0, 300, 500).astype(np.int32), np.ones(500, np.int64))
  config.train.update(dict(batch_size=200, row_length=32))
  config.encoder.dtype = "float32"
  layout = PackedLayout(row_length=32, chunk_rows=1)
  whole = with_chunk_rows(config, queries, labels, positives, layout)
  needed = whole * 32 * chosen.activation_bytes(config)
  assert with_chunk_rows(config, queries, labels, positives, layout, budget=needed) == whole
  for parts in (2, 4, 8):
    rows = with_chunk_rows(config, queries, labels, positives, layout, budget=needed / parts, unit=1)
    assert whole / parts - 1 <= rows <= whole / parts, parts
  assert with_chunk_rows(config, queries, labels, positives, layout, budget=1) == 4, "at least one row for each device"


def test_activations_by_dtype_and_recomputation(config):
  config.encoder.dtype, config.train.row_length = "float32", 32
  stored = chosen.activation_bytes(config)
  config.encoder.dtype = "bfloat16"
  assert stored / 2 < chosen.activation_bytes(config) < stored, "scores are float32 with any dtype"
  config.encoder.num_layers = 12
  stored, config.encoder.remat = chosen.activation_bytes(config), True
  assert chosen.activation_bytes(config) < stored / 2


def test_a_run_keeps_what_was_chosen_when_it_started(config, tmp_path, monkeypatch, caplog):
  caplog.set_level("INFO")
  config.train.batch_size = 64
  setup = set_up_run(config, tmp_path / "run", extract=False)
  write_config(setup, tmp_path / "run")
  found = configuration.read(tmp_path / "run" / "config.json")
  assert found.encoder.dtype == setup.config.encoder.dtype == "float32"
  assert found.train.row_length == setup.layout.row_length == 2 * config.dataset.max_length
  assert found.train.chunk_rows == setup.layout.chunk_rows > 8
  assert f"train.row_length=32, train.chunk_rows={found.train.chunk_rows}" in caplog.text
  monkeypatch.setattr(chosen, "activation_budget", lambda mesh: 1)  # As on a machine with less memory.
  again = set_up_run(config, tmp_path / "run", extract=False)
  assert again.layout == setup.layout
  assert set_up_run(config, tmp_path / "another", extract=False).layout.chunk_rows == 8, "one row for each device"


@pytest.mark.parametrize(
  "queries,expected", [(999, 0), (1_000, 100), (4_000, 400), (8_000, 500), (20_000, 1_000), (2_000_000, 8_192)]
)
def test_as_many_queries_are_held_out_as_suit_their_number(queries, expected, caplog):
  config = load_config("custom")
  with caplog.at_level("INFO"):
    chosen_config = chosen.with_held_out(config, queries)
  assert chosen_config.dataset.validation_fraction * queries == pytest.approx(expected)
  for key in ("retrieval_choose", "blend", "baselines"):
    assert bool(chosen_config.eval[key]) == (expected > 0)
  assert ("999 training queries are too few" in caplog.text) == (expected == 0)
  given = load_config("custom")
  given.dataset.validation_fraction = 0.3
  assert chosen.with_held_out(given, queries) == given


@pytest.mark.parametrize(
  ("labels", "devices", "expected"), [(9, 1, 2), (9, 8, 8), (1, 8, 8), (24, 6, 8), (100_000, 8, 16_384)]
)
def test_free_vectors_are_a_quarter_of_the_labels_and_one_for_each_device(labels, devices, expected):
  assert chosen.with_free_vectors(load_config("custom"), labels, devices).train.free_vectors == expected
