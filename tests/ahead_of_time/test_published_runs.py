"""The expected times against published training runs, and the formulas of `benchmarks.published_runs`."""

import math

import pytest

from benchmarks.published_runs import FULL, RUNS, Model, Run, efficiency, error, fitted, kernels, scaled
from vixml_jax.ahead_of_time.gpu import GPUS
from vixml_jax.ahead_of_time.tpu import TPUS

SMALL = Model(width=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp_dim=128, vocab=100)
WEIGHTS = 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)


def flops(run):
  return sum(times * each for times, each, _ in kernels(run))


def test_the_shares_of_the_chips_are_those_of_the_fitted_runs():
  found = {chip: efficiency(run) for chip, run in fitted(RUNS).items()}
  known = {chip: kind.chip.efficiency for chip, kind in TPUS.items() if chip != "tpu7x"}
  known |= {chip: kind.efficiency for chip, kind in GPUS.items() if chip != "h200"}
  assert found == pytest.approx(known, abs=0.005)
  assert GPUS["h200"].efficiency == GPUS["h100"].efficiency
  assert TPUS["tpu7x"].chip.efficiency == TPUS["v6e"].chip.efficiency, "no run on TPU7x was published"


def test_the_other_runs_take_the_expected_time():
  checked = [run for run in RUNS if run not in fitted(RUNS).values()]
  off = sorted(abs(error(run)) for run in checked)
  assert len(off) >= 27 and off[-4] <= 0.15 < off[-3] and off[-1] < 0.3, "all but three are within 15 %"
  for run in RUNS:
    assert run.roofline.lower_bound < run.seconds, "no run is faster than its lower bound"


@pytest.mark.parametrize(
  "kept,rank,weight,head,attention",
  [
    (None, 0, 6, 6, 3.5),
    (None, 1, 4, 4, 3.5),
    (frozenset({"query", "key", "value", "output", "gate", "up"}), 0, 6, 6, 4.5),
  ],
)
def test_the_products_of_a_step_are_those_counted_by_hand(kept, rank, weight, head, attention):
  run = Run("h100", (1,), "small", SMALL, 32, 5, 1.0, kept, rank=rank)
  tokens, adapters = 5 * 32, 3 * (4 * 64 + 64 + 32 + 32 + 64 + 3 * (64 + 128)) if rank else 0
  by_hand = tokens * (weight * WEIGHTS + head * 64 * 100 + 6 * adapters + attention * 3 * 2 * 32 * 64)
  assert flops(run) == pytest.approx(by_hand)


def test_recomputed_layers_cost_their_products_again_but_the_last():
  plain, again = (Run("h100", (1,), "small", SMALL, 32, 5, 1.0, kept) for kept in (None, FULL))
  last = 3 * 64 * 128
  assert flops(again) - flops(plain) == 5 * 32 * (2 * (WEIGHTS - last) + 3 * 2 * 32 * 64)


def test_chips_that_share_products_have_a_part_of_each():
  alone = Run("v5e", (4, 4), "small", SMALL, 32, 5, 1.0, None)
  shared = Run("v5e", (4, 4), "small", SMALL, 32, 5, 1.0, None, tensor=2)
  assert flops(shared) == pytest.approx(flops(alone)), "twice the tokens, half of each product"
  assert alone.roofline.interconnect > 0


def test_scaled_models_have_the_stated_billions_of_parameters():
  for scale in (16, 32, 64, 128, 256, 512):
    assert math.isclose(scaled(scale).layer_weights, scale * 1e9, rel_tol=0.05)
