"""Chooses the mesh where a config leaves it open (`mesh.fsdp=0`), from the bytes of the parameters and the devices."""

from collections.abc import Callable
import logging
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.run import configuration
from vixml_jax.run.from_config import model_from_config
from vixml_jax.run.workdir import CONFIG

_log = logging.getLogger(__name__)

_GIB = 2.0**30
_MEMORY_SHARE = 0.25  # Image features may take as much. The rest is for activations, the bank and tables of labels.
_COPIES = 4  # Of a trained parameter: its value, its gradient and the two moments of Adam.


def with_mesh(config: ConfigDict, workdir: Path) -> ConfigDict:
  """Returns the config with `mesh.data` and `mesh.fsdp` chosen for the devices of this run where `mesh.fsdp` is 0.

  A run that is continued on as many devices keeps the mesh in the workdir's config.

  Args:
    config: The whole config.
    workdir: Folder of the run, which need not exist.

  Raises:
    InputError: As `choose_mesh`.
  """
  if config.mesh.fsdp:
    return config
  count = len(jax.devices())
  sizes = _stored(config, workdir, count)
  if sizes is None:
    sizes = choose_mesh(config, count, sharding.make_mesh, sharding.device_memory(jax.local_devices()))
  if jax.process_count() > 1:  # Devices of other processes may have a little more or less memory.
    data, fsdp, tensor = multihost_utils.broadcast_one_to_all(np.array(sizes))
    sizes = (int(data), int(fsdp), int(tensor))
  config = config.copy_and_resolve_references()
  config.mesh.update(dict(zip(sharding.MESH_AXES, sizes, strict=True)))
  return config


def choose_mesh(
  config: ConfigDict, count: int, make_mesh: Callable[[int, int, int], Mesh], memory: float
) -> tuple[int, int, int]:
  """Returns the sizes of a mesh: as few devices along `fsdp` as leave three quarters of the memory to other arrays.

  What devices along `fsdp` exchange is the encoder's parameters, for every chunk forward and backward; those along
  `data` exchange the gradients of trained parameters only, once a step. So the parameters, above all those of a frozen
  base, are copied as often as they fit. `mesh.tensor` stays as it is, and `mesh.data` is the rest of the devices.

  Args:
    config: The whole config.
    count: Number of devices.
    make_mesh: Function of the sizes `data`, `fsdp` and `tensor` that returns a mesh.
    memory: Bytes of each device.

  Raises:
    InputError: If `mesh.tensor` does not divide the number of devices, or no mesh divides the parameters.
  """
  tensor = config.mesh.tensor
  if tensor < 1 or count % tensor:
    raise InputError(f"config.mesh.tensor={tensor}: must divide the {count} devices where config.mesh.fsdp=0 is chosen")
  model = model_from_config(config)
  chosen, problem, needed = None, "", 0.0
  for fsdp in (size for size in range(1, count + 1) if count // tensor % size == 0):
    sizes = (count // tensor // fsdp, fsdp, tensor)
    try:
      needed = _encoder_bytes(model, make_mesh(*sizes))
    except (InputError, NotImplementedError) as error:  # JAX raises the latter if a slice has no such mesh.
      problem = str(error)
      continue
    chosen = sizes
    if needed <= _MEMORY_SHARE * memory:
      break
  if chosen is None:
    raise InputError(f"config.mesh.fsdp=0: no mesh of {count} devices can be used ({problem}); set the sizes yourself")
  fits = needed <= _MEMORY_SHARE * memory
  _log.log(
    logging.INFO if fits else logging.WARNING,
    "mesh.data=%d, mesh.fsdp=%d, mesh.tensor=%d: encoder, gradients and optimizer take %.2f of %.2f GiB a device, %s",
    *chosen,
    needed / _GIB,
    memory / _GIB,
    "with the fewest devices along fsdp that take at most a quarter"
    if fits
    else "more than a quarter with any mesh; check with python -m vixml_jax.aot_compile whether the rest fits",
  )
  return chosen


def _stored(config: ConfigDict, workdir: Path, count: int) -> tuple[int, int, int] | None:
  """Returns the sizes in the workdir's config; None if there is none, or it is for other devices."""
  if not (workdir / CONFIG).exists():
    return None
  mesh = configuration.read(workdir / CONFIG).mesh
  sizes = (mesh.data, mesh.fsdp, mesh.tensor)
  if min(sizes) < 1 or np.prod(sizes) != count or mesh.tensor != config.mesh.tensor:
    return None
  _log.info("mesh %s, as this run was started", " x ".join(map(str, sizes)))
  return sizes


def _encoder_bytes(model: ModelDefinition, mesh: Mesh) -> float:
  """Returns the bytes on each device of the encoder's parameters, and of gradients and moments of trained ones."""
  encoder = {"encoder": model.shapes["encoder"]}
  shardings = sharding.tree_shardings(mesh, encoder, {"encoder": model.axes["encoder"]})
  placed = jax.tree.map(
    lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), encoder, shardings
  )
  trained, frozen = (float(sum(map(sharding.bytes_a_device, jax.tree.leaves(part)))) for part in model.split(placed))
  return _COPIES * trained + frozen
