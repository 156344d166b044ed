"""Kinds of TPU chips, and the devices of slices that need not exist."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.errors import InputError

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Properties of one chip, as Google Cloud publishes them (cloud.google.com/tpu/docs/v5e, v5p, v6e, v4).

  Attributes:
    hbm_bytes: Memory that the compiler grants a program; slightly less than the published 16, 95, 32 and 32 GB.
    flops: Peak rate of bfloat16 matrix products, in FLOP/s.
    hbm_bandwidth: HBM bandwidth in bytes/s.
    link_bandwidth: Bandwidth of one link of the interconnect in one direction, in bytes/s: the published bandwidth of
      a chip, divided by its links and both directions.
    axes: Number of axes of the interconnect: 2 for a plane, 3 for a cube.
    wraps_at: An axis of a slice is a ring if its length is a multiple of this, else a line.
    options: Options of `topologies.get_topology_desc` for this kind.
  """

  hbm_bytes: float
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  axes: int
  wraps_at: int
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
  "v4": Chip(30.75 * GIB, 275e12, 1228e9, 50e9, 3, 4, {"chip_config_name": "megacore"}),  # Both cores are one device.
  "v5e": Chip(15.75 * GIB, 197e12, 819e9, 50e9, 2, 16),
  "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 100e9, 3, 4),
  "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 100e9, 2, 16),
}
# Environment variables that libtpu reads when it is loaded: other processes may load it at the same time, and it must
# not ask the network which machine it runs on. The accelerator type replaces that of a machine without TPU; the name of
# the topology decides.
_SETTINGS = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
_EXAMPLES = "v5e:4x4, v5p:2x2x4, v6e:16x16"


@dataclasses.dataclass(frozen=True)
class Slice:
  """Connected chips of one kind.

  Attributes:
    name: Kind and shape, such as "v5e:4x4".
    chip: Properties of each chip.
    shape: Number of chips along each axis of the interconnect.
    devices: JAX devices, one per chip.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  devices: list[jax.Device]

  def mesh(self, data: int, fsdp: int, tensor: int) -> Mesh:
    """Returns the mesh of these sizes.

    Raises:
      InputError: If the product of the sizes is not the number of chips, or the mesh does not fit the interconnect.
    """
    try:
      return sharding.make_mesh(data, fsdp, tensor, devices=self.devices)
    except NotImplementedError as error:  # JAX raises it if a mesh axis is not a product of axes of the slice.
      raise InputError(
        f"mesh: {data} x {fsdp} x {tensor} cannot be mapped to the {'x'.join(map(str, self.shape))} chips of "
        f"{self.name}; change mesh.data, mesh.fsdp or mesh.tensor"
      ) from error

  def ring_bandwidth(self, group: int) -> float:
    """Returns the bytes/s that a chip sends while `group` chips exchange as rings.

    A group that is longer than an axis of the slice spans several axes and uses the links of all of them. If an axis
    is not a ring, the chips at its ends have only one link along it, and all others wait for them.
    """
    axes, reached = 0, 1
    for length in sorted(self.shape, reverse=True):
      if reached < group:
        axes, reached = axes + 1, reached * length
    ring = all(length % self.chip.wraps_at == 0 for length in self.shape)
    return self.chip.link_bandwidth * max(axes, 1) * (2 if ring else 1)


def tpu_slice(name: str) -> Slice:
  """Returns a slice of a Cloud TPU pod as libtpu describes it; no TPU is needed.

  Args:
    name: Kind and shape, such as "v5e:4x4" or "v5p:2x2x4".

  Raises:
    InputError: If the kind or the shape is unknown, or libtpu is not installed.
  """
  kind, _, shape = name.partition(":")
  if kind not in CHIPS or not re.fullmatch(rf"\d+(x\d+){{{CHIPS[kind].axes - 1}}}", shape):
    raise InputError(
      f"--topology={name}: must be one of {', '.join(CHIPS)}, a colon and the number of chips along each axis, "
      f"such as {_EXAMPLES}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "libtpu is not installed, which compiles for TPUs on any machine; run: pip install -c constraints.txt -e '.[tpu]'"
    )
  for name_of_setting, value in _SETTINGS.items():
    os.environ.setdefault(name_of_setting, value)
  axes = tuple(int(length) for length in shape.split("x"))
  try:
    described = topologies.get_topology_desc(name, platform="tpu", **CHIPS[kind].options)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    raise InputError(
      f"--topology={name}: libtpu does not know this slice ({error}); choose one such as {_EXAMPLES}"
    ) from error
  devices = list(described.devices)
  if len(devices) != math.prod(axes):
    raise InputError(
      f"--topology={name}: libtpu describes {len(devices)} devices for {math.prod(axes)} chips; choose a topology with "
      "one device per chip"
    )
  return Slice(name, CHIPS[kind], axes, devices)
