"""The order of the devices of several TPU slices in a mesh."""

from collections.abc import Sequence
import logging
import math

import jax
from jax.experimental import mesh_utils
import numpy as np

from vixml_jax.errors import InputError

_log = logging.getLogger(__name__)

# Kinds of chips of which a mesh axis may be a part of an axis of the slice, as in `jax.make_mesh`.
_SPLITTABLE = ("TPU v5 lite", "TPU v5e")


def devices_over_slices(sizes: tuple[int, int, int], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
  """Returns the devices of several slices in the order of a mesh, in which each slice is one block.

  Args:
    sizes: Sizes data, fsdp and tensor of the mesh.
    slices: Number of slices.
    devices: Their devices.

  Raises:
    InputError: The slices cannot be divided along data and fsdp.
  """
  data, fsdp, tensor = sizes
  over_data = math.gcd(data, slices)
  over_fsdp = slices // over_data
  if fsdp % over_fsdp:
    raise InputError(
      f"mesh: {slices} slices cannot be divided along data={data} and fsdp={fsdp}, and tensor must stay within a "
      f"slice; make mesh.data a multiple of {slices}"
    )
  if over_fsdp > 1:
    _log.warning(
      "mesh.data=%d is not a multiple of the %d slices, so parameters are gathered over the data center network; "
      "mesh.data=%d is faster",
      data,
      slices,
      slices,
    )
  inside = (data // over_data, fsdp // over_fsdp, tensor)
  try:
    return mesh_utils.create_hybrid_device_mesh(
      inside, (over_data, over_fsdp, 1), devices, allow_split_physical_axes=devices[0].device_kind in _SPLITTABLE
    )
  except ValueError as error:  # The slices do not have the same number of devices.
    raise InputError(f"mesh: the devices of {slices} slices cannot be divided ({error})") from error
