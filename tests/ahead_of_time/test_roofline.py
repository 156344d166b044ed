"""The roofline of a program, and the FLOPs that a model needs."""

import dataclasses

import numpy as np

from tests.helpers.cpu_slices import ROOMY_CHIP, cpu_slice
from tests.helpers.miniature_runs import load_config
from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.roofline import Roofline, model_flops
from vixml_jax.run.from_config import model_from_config


def test_the_roofline_is_the_slowest_of_three():
  where = cpu_slice()
  cost = Cost(flops=1e12, unit_flops=3e12, hbm_bytes=5e10, collectives={Collective("all-gather", 4 * 10**9, 4): 2.0})
  roofline = Roofline.of(cost, where)
  assert (roofline.compute, roofline.hbm, roofline.interconnect) == (3.0, 5.0, 6.0)
  assert (roofline.lower_bound, roofline.bound) == (6.0, "interconnect")


def test_kernels_of_a_gpu_run_one_after_another():
  # 2 s of products with 1 s of traffic, twice; and 3 s of traffic alone.
  cost = Cost(flops=4e12, unit_flops=4e12, hbm_bytes=5e10, kernels={(2e12, 1e10): 2.0, (0.0, 3e10): 1.0})
  assert Roofline.of(cost, cpu_slice(overlaps=True)).lower_bound == 5.0
  roofline = Roofline.of(cost, cpu_slice(overlaps=False))
  assert (roofline.kernels, roofline.lower_bound, roofline.bound) == (7.0, 7.0, "hbm")


def test_the_expected_time_is_that_of_the_kernels_at_the_share_that_real_runs_reach():
  kernels = {(2e12, 1e10): 2.0, (0.0, 3e10): 1.0}  # 7 s, as above.
  cost = Cost(flops=4e12, unit_flops=4e12, hbm_bytes=5e10, kernels=kernels)
  for overlaps in (True, False):
    assert Roofline.of(cost, cpu_slice(overlaps=overlaps)).expected == 7.0 / ROOMY_CHIP.efficiency
  # Traffic of asynchronous operations is in the total only.
  cost = dataclasses.replace(cost, hbm_bytes=9e10)
  assert Roofline.of(cost, cpu_slice()).expected == 9.0 / ROOMY_CHIP.efficiency
  slow = dataclasses.replace(cost, collectives={Collective("all-gather", 4 * 10**9, 4): 10.0})
  assert Roofline.of(slow, cpu_slice()).expected == 30.0, "collectives run beside the kernels"


def test_model_flops_are_two_per_weight_and_token_forward_and_six_in_training():
  config = load_config("custom", "encoder=minilm-l6")
  config.train.free_vectors = 8
  model = model_from_config(config)
  depth, width, mlp, tokens = 6, 384, 1536, 20
  weights = depth * (4 * width * width + 2 * width * mlp)
  attention = depth * 4 * tokens * tokens * width  # Each token with each other, for logits and for values.
  lengths = np.full(3, tokens)
  assert model_flops(model, lengths, train=False) == 3 * (2 * weights * tokens + attention)
  assert model_flops(model, lengths, train=True) == 3 * 3 * (2 * weights * tokens + attention)


def test_frozen_weights_have_no_gradient_of_their_own():
  model = model_from_config(load_config("lf_amazon_1.3m", "encoder=qwen2.5-0.5b"))
  depth, width, mlp, rank, heads, kv = 24, 896, 4864, 256, 14 * 64, 2 * 64
  shapes = [(width, heads), (width, kv), (width, kv), (heads, width), (width, mlp), (width, mlp), (mlp, width)]
  base = depth * sum(a * b for a, b in shapes)
  adapters = depth * sum(rank * (a + b) for a, b in shapes)
  attention = depth * 4 * heads
  assert model_flops(model, np.ones(1), train=True) == 4 * base + 6 * adapters + 3 * attention
