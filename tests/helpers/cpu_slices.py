"""The eight CPU devices of the tests as a machine, for which the same code compiles as for TPUs and GPUs."""

import dataclasses

import jax

from vixml_jax.ahead_of_time.machine import GIB, Chip, Machine, Torus

ROOMY_CHIP = Chip(
  hbm_bytes=8 * GIB, flops=1e12, hbm_bandwidth=1e10, product_cost={"highest": 6.0}, overlaps=True, efficiency=0.5
)
LINK_BANDWIDTH = 1e9


def cpu_slice(hbm_bytes: float = ROOMY_CHIP.hbm_bytes, overlaps: bool = True) -> Machine:
  """Returns the CPU devices as 2 x 4 chips with this much memory each."""
  chip = dataclasses.replace(ROOMY_CHIP, hbm_bytes=hbm_bytes, overlaps=overlaps)
  return Machine("cpu:2x4", chip, Torus((2, 4), LINK_BANDWIDTH, wraps_at=16), jax.devices(), chips_per_host=8)
