"""Machines that need not exist: devices to compile for, their memory, their speed and their interconnect."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.errors import InputError

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Properties of one TPU chip or one GPU.

  Attributes:
    hbm_bytes: Memory that a program may use.
    flops: Peak rate of bfloat16 matrix products, in FLOP/s.
    hbm_bandwidth: Bandwidth of the memory in bytes/s.
    product_cost: How many bfloat16 products a product of other operands costs: "default", "high" and "highest" for
      float32 at these precisions, "int8" and "float8". 1 where it is not given.
    overlaps: Whether products, memory traffic and collectives of different operations run at the same time, as on a
      TPU. On a GPU, kernels run one after another.
    efficiency: Share that real runs reach: the time of their kernels, each of which takes the longer of its products at
      the peak rate and its memory traffic at the full bandwidth, divided by the time that was measured. It follows from
      published runs (`benchmarks/published_runs.py`).
  """

  hbm_bytes: float
  flops: float
  hbm_bandwidth: float
  product_cost: Mapping[str, float]
  overlaps: bool
  efficiency: float


class Interconnect(Protocol):
  """What connects the chips of a machine."""

  def ring_bandwidth(self, group: int) -> float:
    """Returns the bytes/s that a chip sends while `group` chips exchange as rings."""


@dataclasses.dataclass(frozen=True)
class Torus:
  """Chips that are linked to their neighbors along two or three axes.

  Attributes:
    shape: Number of chips along each axis.
    link_bandwidth: Bandwidth of one link in one direction, in bytes/s.
    wraps_at: An axis is a ring if its length is a multiple of this, else a line.
  """

  shape: tuple[int, ...]
  link_bandwidth: float
  wraps_at: int

  def ring_bandwidth(self, group: int) -> float:
    """Returns the bytes/s that a chip sends while `group` chips exchange as rings.

    A group that is longer than an axis spans several axes and uses the links of all of them. If an axis is not a ring,
    the chips at its ends have only one link along it, and all others wait for them.
    """
    axes, reached = 0, 1
    for length in sorted(self.shape, reverse=True):
      if reached < group:
        axes, reached = axes + 1, reached * length
    ring = all(length % self.wraps_at == 0 for length in self.shape)
    return self.link_bandwidth * max(axes, 1) * (2 if ring else 1)


@dataclasses.dataclass(frozen=True)
class Switch:
  """Chips that all reach each other through a switch.

  Attributes:
    bandwidth: Bytes/s that a chip sends.
  """

  bandwidth: float

  def ring_bandwidth(self, group: int) -> float:
    """Returns the bytes/s that a chip sends, which do not depend on the size of the group."""
    del group
    return self.bandwidth


@dataclasses.dataclass(frozen=True)
class Machine:
  """Connected chips of one kind: a slice of a TPU pod, or the GPUs of a host.

  Attributes:
    name: Kind and shape, such as "v5e:4x4" or "h100:8".
    chip: Properties of each chip.
    interconnect: What connects the chips.
    devices: JAX devices, one per chip.
    chips_per_host: Number of chips of a host, which are the devices of one process.
    budget: What limits the memory of a program, in words, for the user.
    compiler_options: Options of `jax.stages.Lowered.compile`.
  """

  name: str
  chip: Chip
  interconnect: Interconnect
  devices: list[jax.Device]
  chips_per_host: int
  budget: str = "granted by the compiler"
  compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def hosts(self) -> int:
    """Number of hosts, each of which runs one process."""
    return math.ceil(len(self.devices) / self.chips_per_host)

  def mesh(self, data: int, fsdp: int, tensor: int) -> Mesh:
    """Returns the mesh of these sizes.

    Raises:
      InputError: If the product of the sizes is not the number of chips, or the mesh does not fit the interconnect.
    """
    try:
      return sharding.make_mesh(data, fsdp, tensor, devices=self.devices)
    except NotImplementedError as error:  # JAX raises it if a mesh axis is not a product of axes of a TPU slice.
      raise InputError(
        f"mesh: {data} x {fsdp} x {tensor} cannot be mapped to the chips of {self.name}; change mesh.data, mesh.fsdp "
        "or mesh.tensor"
      ) from error
