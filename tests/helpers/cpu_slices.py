"""The eight CPU devices of the tests as a slice, for which the same code compiles as for TPUs."""

import dataclasses

import jax

from vixml_jax.ahead_of_time.chips import GIB, Chip, Slice

ROOMY_CHIP = Chip(hbm_bytes=8 * GIB, flops=1e12, hbm_bandwidth=1e10, link_bandwidth=1e9, axes=2, wraps_at=16)


def cpu_slice(hbm_bytes: float = ROOMY_CHIP.hbm_bytes) -> Slice:
  """Returns the CPU devices as a slice of 2 x 4 chips with this much memory each."""
  return Slice("cpu:2x4", dataclasses.replace(ROOMY_CHIP, hbm_bytes=hbm_bytes), (2, 4), jax.devices())
