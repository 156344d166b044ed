"""Computes the least time that a program can take on a chip, and the FLOPs that a model needs."""

import dataclasses
import re

import numpy as np

from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.machine import Machine
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.weights import engine


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Lower bounds of a program's time, in seconds.

  Attributes:
    compute: Matrix products at the chip's bfloat16 peak; those in float32 as many times slower as the chip is at them.
    hbm: HBM traffic at the published bandwidth.
    interconnect: Collectives as rings, one after another.
    kernels: Sum over all kernels of the longer of its compute and HBM times, for chips that run one kernel after
      another; None for chips on which different operations overlap.
  """

  compute: float
  hbm: float
  interconnect: float
  kernels: float | None = None

  @classmethod
  def of(cls, cost: Cost, where: Machine) -> "Roofline":
    """Returns the roofline of a program with this cost on a machine."""
    chip = where.chip
    sent = sum(
      times * collective.moved / where.interconnect.ring_bandwidth(collective.group)
      for collective, times in cost.collectives.items()
    )
    kernels = None
    if not chip.overlaps:
      kernels = sum(
        times * max(flops / chip.flops, size / chip.hbm_bandwidth) for (flops, size), times in cost.kernels.items()
      )
    return cls(cost.unit_flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth, sent, kernels)

  @property
  def seconds(self) -> float:
    """The largest of the times, which assumes that the others overlap with it completely."""
    return max(self.compute, self.hbm, self.interconnect, self.kernels or 0.0)

  @property
  def bound(self) -> str:
    """What takes that time: "compute", "hbm" or "interconnect"; on a GPU, the larger part of the kernels' time."""
    if self.interconnect >= max(self.compute, self.hbm, self.kernels or 0.0):
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
