"""Batches of made-up items with the lengths of a data set."""

import pytest

from tests.helpers.miniature_runs import load_config
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.ahead_of_time.workload import Workload, item_lengths


def test_a_synthetic_batch_has_the_requested_lengths():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3,images=3")
  config.fusion.modality_dropout = 0.0
  size = DataSize(10_000, 0, 5_000, tokens=12.0, images=2.5)
  lengths = item_lengths(Workload.of(config, size).batch.items.segments)
  assert len(lengths) == 2 * config.train.batch_size
  assert lengths.mean() == pytest.approx(12.0 + 2.5, rel=0.02)
