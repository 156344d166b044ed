"""Computes the least and the expected time of a program on a chip, and the FLOPs that a model needs."""

import dataclasses
import re

import numpy as np

from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.machine import Machine
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.weights import engine


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Times of a program, in seconds: a lower bound with its parts, and what to expect of a real run.

  Attributes:
    compute: Matrix products at the chip's bfloat16 peak; those in float32, int8 or float8 as many times slower or
      faster as the chip is at them.
    hbm: HBM traffic at the published bandwidth.
    interconnect: Collectives as rings, one after another.
    kernels: Sum over all kernels of the longer of its compute and HBM times.
    lower_bound: The largest of the times, as if the others overlapped with it completely; `kernels` is one of them for
      chips that run one kernel after another.
    expected: `kernels`, or all products or all traffic where asynchronous operations make these longer, divided by the
      share that real runs on this chip reach (`Chip.efficiency`); or `interconnect` if that is longer.
  """

  compute: float
  hbm: float
  interconnect: float
  kernels: float
  lower_bound: float
  expected: float

  @classmethod
  def of(cls, cost: Cost, where: Machine) -> "Roofline":
    """Returns the roofline of a program with this cost on a machine."""
    chip = where.chip
    sent = sum(
      times * collective.moved / where.interconnect.ring_bandwidth(collective.group)
      for collective, times in cost.collectives.items()
    )
    kernels = sum(
      times * max(flops / chip.flops, size / chip.hbm_bandwidth) for (flops, size), times in cost.kernels.items()
    )
    compute, hbm = cost.unit_flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth
    lower_bound = max(compute, hbm, sent, 0.0 if chip.overlaps else kernels)
    # Operations that run beside the kernels are not in their sum, but their products and traffic take time as well.
    expected = max(max(compute, hbm, kernels) / chip.efficiency, sent)
    return cls(compute, hbm, sent, kernels, lower_bound, expected)

  @property
  def bound(self) -> str:
    """What takes the lower bound: "compute", "hbm" or "interconnect"; on a GPU, the larger part of the kernels."""
    if self.interconnect >= self.lower_bound:
      return "interconnect"
    return "compute" if self.compute >= self.hbm else "hbm"


def model_flops(model: ModelDefinition, lengths: np.ndarray, train: bool) -> float:
  """Returns the FLOPs that the encoder's layers need for items of these lengths, without any recomputation.

  Per token, a weight costs 2 FLOPs forward, 2 for the gradient of its input and 2 for its own gradient, which frozen
  weights do not have. Training N weights costs 6 N, and 4 N if they are frozen. Attention costs 4 times length, heads
  and head width forward, and twice that backward. Embeddings, fusion, prototypes and losses are not counted.

  Args:
    model: Definition of the model.
    lengths: Number of tokens of each item, int [items].
    train: Whether to count the backward pass.
  """
  layers = engine.flatten_tree(model.shapes["encoder"]["layers"])
  trained = engine.flatten_tree(model.split(model.shapes)[0].get("encoder", {}))
  matrices = {name: shape for name, shape in layers.items() if re.search("/(kernel|lora_[ab])$", name)}
  each = sum(
    shape.size * (2 + (2 + 2 * (f"layers/{name}" in trained) if train else 0)) for name, shape in matrices.items()
  )
  depth, _, *heads = layers["attention/query/kernel"].shape
  attention = 4 * depth * np.prod(heads) * (3 if train else 1)
  lengths = lengths.astype(np.float64)
  return float(each * lengths.sum() + attention * np.square(lengths).sum())
