"""The candidates of the search for the fastest step, and the bounds of their time and memory."""

import ast
import dataclasses
import shlex

import pytest

from tests.helpers.cpu_slices import cpu_slice
from tests.helpers.miniature_runs import load_config
from vixml_jax.ahead_of_time.candidates import candidates
from vixml_jax.ahead_of_time.compiling import compile_program
from vixml_jax.ahead_of_time.estimate import compile_train_step, estimate_train_step
from vixml_jax.ahead_of_time.machine import Torus
from vixml_jax.ahead_of_time.plan import MeshPlan, bytes_a_chip
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.ahead_of_time.workload import Workload
from vixml_jax.run import configuration

SIZE = DataSize(2_000, 0, 1_000, 15.0, 0.0)


def workload_of(encoder, **keys):
  config = load_config("lf_amazon_titles_131k", f"encoder={encoder}")
  config.update_from_flattened_dict({"train.batch_size": 256, "train.chunk_rows": 32} | keys)
  return Workload.of(config, SIZE)


def choices(workload, chunk_rows):
  """What the candidates with this chunk size on one mesh recompute, as the keys that differ; each is a valid config."""
  found = []
  for each in candidates(workload, cpu_slice(1e12)):
    if each.sized.mesh_plan == MeshPlan(8, 1, 1, chunk_rows):
      config = each.sized.workload.config.copy_and_resolve_references()
      config.update_from_flattened_dict(dict(each.keys))
      configuration.check(config)
      found.append(dict(each.keys))
  return found


def test_encoders_recompute_layers_or_chunks_or_nothing():
  several, one = (choices(workload_of("minilm-l3"), rows) for rows in (32, 64))
  assert len(several) == 3 and len(one) == 2
  for each in ({}, {"encoder.remat": True}, {"train.chunks_in": "layer"}):
    assert each in several
  assert {"train.chunks_in": "layer"} not in one, "a single chunk is the same within layers"


def test_recomputed_layers_may_store_activations_by_name():
  keys = {"encoder.remat": True, "encoder.remat_saved": ("up",)}
  found = choices(workload_of("minilm-l3", **keys), 32)
  assert {} in found and {"encoder.remat_saved": ()} in found
  assert {"encoder.remat": False, "encoder.remat_saved": ()} in found, "without recomputation, nothing is saved by name"
  assert {"encoder.remat_saved": (), "train.chunks_in": "layer"} in found
  saved = [each["encoder.remat_saved"] for each in found if each.keys() == {"encoder.remat_saved"}]
  assert ("up", "query", "key", "value") in saved and not any("gate" in names for names in saved)


def test_decoders_may_also_store_the_gate():
  found = choices(workload_of("qwen2.5-0.5b"), 32)
  assert {"encoder.remat_saved": ("gate", "query", "key", "value")} in found


def test_what_keeps_too_many_activations_is_left_out(caplog):
  workload = workload_of("minilm-l3", **{"encoder.remat": True, "encoder.num_layers": 24})
  roomy = [each for each in candidates(workload, cpu_slice(1e12)) if each.sized.mesh_plan == MeshPlan(8, 1, 1, 64)]
  needs = {str(each.keys): each.memory for each in roomy}
  stored, none = needs["{'encoder.remat': False}"], needs["{}"]
  # Of each of 24 layers: query, key, value [384] and up [1536] of 8 rows of 128 tokens, in bfloat16.
  assert stored - none == 24 * (3 * 384 + 1536) * 8 * 128 * 2
  with caplog.at_level("INFO"):
    tight = candidates(workload, cpu_slice((stored + none) / 2))
  kept = [each.keys for each in tight if each.sized.mesh_plan == MeshPlan(8, 1, 1, 64)]
  assert {} in kept and {"encoder.remat": False} not in kept
  assert "others are left out, because their arrays" in caplog.text


def test_flags_are_quoted_for_a_shell():
  workload = workload_of("minilm-l3", **{"encoder.remat": True})
  flags = [shlex.split(each.flags) for each in candidates(workload, cpu_slice(1e12))]
  prefix = "--config.encoder.remat_saved="
  saved = {flag.removeprefix(prefix) for each in flags for flag in each if flag.startswith(prefix)}
  assert ("query", "key", "value") in {ast.literal_eval(text) for text in saved}


@pytest.mark.parametrize(
  "changes,rows",
  [
    pytest.param({}, 32, marks=pytest.mark.slow),
    ({"train.chunks_in": "layer"}, 32),
    pytest.param(
      {"encoder.remat": True, "encoder.remat_saved": ("query", "key", "value", "up")}, 64, marks=pytest.mark.slow
    ),
  ],
  ids=str,
)
def test_no_step_takes_less_time_and_memory_than_its_bounds(changes, rows):
  # Products are all that takes time. Of 12 layers, the loss and the prototypes cost little.
  where = cpu_slice()
  chip = dataclasses.replace(where.chip, hbm_bandwidth=1e30)
  where = dataclasses.replace(where, chip=chip, interconnect=Torus((2, 4), 1e30, wraps_at=16))
  workload = workload_of("minilm-l3", **changes, **{"train.chunk_rows": rows, "encoder.num_layers": 12})
  mesh_plan = MeshPlan(8, 1, 1, rows)
  own = next(each for each in candidates(workload, where) if each.sized.mesh_plan == mesh_plan and not each.keys)
  step = estimate_train_step(own.plan, compile_train_step(own.plan, compile_program))
  assert 0 < own.bound <= step.roofline.expected < 1.3 * own.bound
  assert bytes_a_chip(own.plan.train_arguments) < own.memory <= step.program.memory.total
