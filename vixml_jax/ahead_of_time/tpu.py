"""Slices of Cloud TPU pods, which libtpu describes and compiles for on any machine."""

from collections.abc import Mapping
import dataclasses
import importlib.util
import math
import os
import re
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import topologies

from vixml_jax.ahead_of_time.machine import GIB, Chip, Machine, Torus
from vixml_jax.errors import InputError, install_command

# The matrix unit multiplies bfloat16. A float32 product takes several passes, by precision.
_FLOAT32_COST = {"default": 1.0, "high": 3.0, "highest": 6.0}
# The published peaks in int8 are twice those in bfloat16: 393 TOP/s of v5e, 918 of v5p, 1,836 of v6e. That of v4 is the
# same as in bfloat16. None of them has a published peak in float8. TPU7x has: 4,614 TFLOP/s, but none in int8.
_FAST_INT8 = _FLOAT32_COST | {"int8": 0.5}
_FAST_FLOAT8 = _FLOAT32_COST | {"float8": 0.5}


def _chip(
  granted_gib: float,
  flops: float,
  hbm_bandwidth: float,
  efficiency: float,
  product_cost: Mapping[str, float] = MappingProxyType(_FAST_INT8),
) -> Chip:
  """Returns a chip, given the memory that its compiler grants a program, slightly less than the published one."""
  return Chip(granted_gib * GIB, flops, hbm_bandwidth, product_cost, overlaps=True, efficiency=efficiency)


@dataclasses.dataclass(frozen=True)
class _TpuKind:
  """A kind of TPU, as Google Cloud publishes it (cloud.google.com/tpu/docs/v5e, v5p, v6e, v4, tpu7x).

  Attributes:
    chip: Properties of each chip, or of each device if a chip has two.
    link_bandwidth: Bandwidth of one link of the interconnect in one direction, in bytes/s: the published bandwidth of
      a chip, divided by its links and both directions.
    axes: Number of axes of the interconnect: 2 for a plane, 3 for a cube.
    wraps_at: See `Torus`.
    chips_per_host: Number of chips of a host of a larger slice.
    devices_per_chip: Number of JAX devices of a chip. Each has its share of the chip's rates and memory.
    options: Options of `topologies.get_topology_desc`.
  """

  chip: Chip
  link_bandwidth: float
  axes: int
  wraps_at: int
  chips_per_host: int = 4
  devices_per_chip: int = 1
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


TPUS = {
  # "megacore": both cores are one device.
  "v4": _TpuKind(
    _chip(30.75, 275e12, 1228e9, 0.71, _FLOAT32_COST), 50e9, 3, 4, options={"chip_config_name": "megacore"}
  ),
  "v5e": _TpuKind(_chip(15.75, 197e12, 819e9, 0.79), 50e9, 2, 16),
  "v5p": _TpuKind(_chip(95.74, 459e12, 2765e9, 0.76), 100e9, 3, 4),
  "v6e": _TpuKind(_chip(31.25, 918e12, 1640e9, 0.58), 100e9, 2, 16),
  # Ironwood: each of the two cores is a device with half of the memory, 2,307 TFLOP/s, 7,380 GB/s and links. No run on
  # it is published of which the share that it reached could be computed; that of v6e is assumed.
  "tpu7x": _TpuKind(_chip(94.75, 2307e12 / 2, 7380e9 / 2, 0.58, _FAST_FLOAT8), 100e9 / 2, 3, 4, devices_per_chip=2),
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
EXAMPLES = "v5e:4x4, v5p:2x2x4, v6e:16x16, v6e:16x16*2"


def is_shape(kind: str, shape: str) -> bool:
  """Returns whether a text is a shape of this kind of slices, such as "2x2x4" of v5p."""
  return re.fullmatch(rf"\d+(x\d+){{{TPUS[kind].axes - 1}}}", shape) is not None


def tpu_slices(kind: str, shape: str, slices: int = 1) -> Machine:
  """Returns slices of Cloud TPU pods as libtpu describes them; no TPU is needed.

  Args:
    kind: A key of `TPUS`.
    shape: Number of chips along each axis of a slice, such as "4x4".
    slices: Number of slices. What they send to each other is not timed, so that lower bounds hold.

  Raises:
    InputError: If libtpu is not installed, or does not know the slice.
  """
  name = f"{kind}:{shape}"
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(f"libtpu is not installed, which compiles for TPUs on any machine; run: {install_command('tpu')}")
  for name_of_setting, value in _SETTINGS.items():
    os.environ.setdefault(name_of_setting, value)
  tpu, axes = TPUS[kind], tuple(int(length) for length in shape.split("x"))
  try:
    options = tpu.options | ({"num_slices": slices} if slices > 1 else {})
    described = topologies.get_topology_desc(name, platform="tpu", **options)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    raise InputError(
      f"--topology={name}: libtpu does not know this slice ({error}); choose one such as {EXAMPLES}"
    ) from error
  devices = list(described.devices)
  chips = math.prod(axes) * slices
  if len(devices) != chips * tpu.devices_per_chip:
    raise InputError(
      f"--topology={name}: libtpu describes {len(devices)} devices for {chips} chips; choose a topology with "
      f"{tpu.devices_per_chip} per chip"
    )
  name += f"*{slices}" if slices > 1 else ""
  torus = Torus(axes, tpu.link_bandwidth, tpu.wraps_at)
  return Machine(name, tpu.chip, torus, devices, tpu.chips_per_host * tpu.devices_per_chip)
