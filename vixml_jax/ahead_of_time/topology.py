"""Machines by the name of their topology."""

from vixml_jax.ahead_of_time import gpu, tpu
from vixml_jax.ahead_of_time.machine import Machine
from vixml_jax.errors import InputError


def machine_of(name: str) -> Machine:
  """Returns the machine of a topology such as "v5e:4x4" (TPUs), "v5e:4x4*2" (two such slices) or "h100:8" (GPUs).

  Raises:
    InputError: If the kind or the shape is unknown, or the compiler for it is not installed.
  """
  kind, _, shape = name.partition(":")
  shape, times, slices = shape.partition("*")
  if kind in tpu.TPUS and tpu.is_shape(kind, shape) and ((slices.isdecimal() and int(slices) > 0) or not times):
    return tpu.tpu_slices(kind, shape, int(slices or 1))
  if kind in gpu.GPUS and gpu.is_shape(shape) and not times:
    return gpu.gpu_host(kind, shape)
  raise InputError(
    f"--topology={name}: must be a kind of TPU ({', '.join(tpu.TPUS)}), a colon and the number of chips along each "
    f"axis, such as {tpu.EXAMPLES} (the last: two slices); or a kind of GPU ({', '.join(gpu.GPUS)}), a colon and the "
    f"number of GPUs of the host, 1 to 8, such as {gpu.EXAMPLES}"
  )
