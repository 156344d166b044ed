"""Batches of made-up items with the lengths of a data set."""

import dataclasses

import jax
import pytest

from tests.helpers.cpu_slices import cpu_slice
from tests.helpers.miniature_runs import load_config
from vixml_jax.ahead_of_time.machine import GIB
from vixml_jax.ahead_of_time.plan import MeshPlan, mesh_plan_of, workload_on
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.ahead_of_time.workload import Workload, item_lengths
from vixml_jax.run.chosen import activation_bytes


def test_a_synthetic_batch_has_the_requested_lengths():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3,images=3")
  config.fusion.modality_dropout = 0.0
  size = DataSize(10_000, 0, 5_000, tokens=12.0, images=2.5)
  lengths = item_lengths(Workload.of(config, size).batch.items.segments)
  assert len(lengths) == 2 * config.train.batch_size
  assert lengths.mean() == pytest.approx(12.0 + 2.5, rel=0.02)


def test_a_chunk_that_is_left_open_holds_a_whole_batch_where_its_activations_fit():
  config = load_config("lf_amazon_131k")
  size, one_chip = DataSize(10_000, 0, 5_000, tokens=128.0, images=0.0), MeshPlan(1, 1, 1, 0)
  rows = {}
  for gib in (32, 64, 1024):
    where = dataclasses.replace(cpu_slice(hbm_bytes=gib * GIB), devices=jax.devices()[:1])
    workload = workload_on(config, size, where)
    rows[gib] = workload.config.train.chunk_rows
    assert mesh_plan_of(workload.config, where) == dataclasses.replace(one_chip, chunk_rows=rows[gib])
    activations = activation_bytes(workload.config) * workload.config.train.row_length * rows[gib]
    assert activations <= gib * GIB / 2
  whole = len(workload.batch.items.tokens[0])
  assert rows[1024] == whole and len(workload.batch.items.filled) == 1
  assert rows[64] == pytest.approx(whole / 4, abs=8) and rows[32] == pytest.approx(whole / 8, abs=8)
