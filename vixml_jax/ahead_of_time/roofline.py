"""The least time that programs can take on a chip, and what a run of them comes to."""

import dataclasses
import re

import numpy as np

from vixml_jax.ahead_of_time.chips import Slice
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.weights import engine


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that a program takes if all else were free.

  Attributes:
    compute: matrix products at the chip's bfloat16 peak, those in float32 with all their passes.
    hbm: its traffic of HBM at the published bandwidth.
    interconnect: its collectives as rings, one after the other.
  """

  compute: float
  hbm: float
  interconnect: float

  @classmethod
  def of(cls, cost: Cost, where: Slice) -> "Roofline":
    """The three times of a program on a slice."""
    sent = sum(
      times * collective.moved / where.ring_bandwidth(collective.group)
      for collective, times in cost.collectives.items()
    )
    return cls(cost.unit_flops / where.chip.flops, cost.hbm_bytes / where.chip.hbm_bandwidth, sent)

  @property
  def seconds(self) -> float:
    """The largest of the three, as if the other two went on beside it."""
    return max(dataclasses.astuple(self))

  @property
  def bound(self) -> str:
    """Which one that is."""
    times = dataclasses.asdict(self)
    return max(times, key=times.__getitem__)


def model_flops(model: ModelDefinition, lengths: np.ndarray, train: bool) -> float:
  """FLOPs that the encoder's layers need for items of these lengths, nothing computed twice.

  A weight costs 2 a token forward, 2 for the gradient of its input, 2 for its own, which frozen ones have not:
  6 N of a full model, 4 N with adapters. Attention adds 4 times length, heads and their width, and twice that
  backward. Embeddings, fusion, prototypes and losses are left out.

  Args:
    model: the model's definition.
    lengths: int [items], tokens of each.
    train: also backward.
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
