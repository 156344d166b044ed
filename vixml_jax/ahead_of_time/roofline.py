"""Computes the least time that a program can take on a chip, and the FLOPs that a model needs."""

import dataclasses
import re

import numpy as np

from vixml_jax.ahead_of_time.chips import Slice
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.weights import engine


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Lower bounds of a program's time, in seconds; each ignores all other costs.

  Attributes:
    compute: Matrix products at the chip's bfloat16 peak; those in float32 with all their passes.
    hbm: HBM traffic at the published bandwidth.
    interconnect: Collectives as rings, one after another.
  """

  compute: float
  hbm: float
  interconnect: float

  @classmethod
  def of(cls, cost: Cost, where: Slice) -> "Roofline":
    """Returns the roofline of a program with this cost on a slice."""
    sent = sum(
      times * collective.moved / where.ring_bandwidth(collective.group)
      for collective, times in cost.collectives.items()
    )
    return cls(cost.unit_flops / where.chip.flops, cost.hbm_bytes / where.chip.hbm_bandwidth, sent)

  @property
  def seconds(self) -> float:
    """The largest of the three times, which assumes that the other two overlap with it completely."""
    return max(dataclasses.astuple(self))

  @property
  def bound(self) -> str:
    """Name of the largest of the three times."""
    times = dataclasses.asdict(self)
    return max(times, key=times.__getitem__)


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
