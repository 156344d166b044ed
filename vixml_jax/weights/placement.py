"""Reads checkpoints straight into sharded device arrays, one tensor at a time."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, Protocol

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.models.quantized import quantize_kernel
from vixml_jax.typing import Array
from vixml_jax.weights import engine
from vixml_jax.weights.tables import Table


class WindowSource(engine.TensorSource, Protocol):
  """A checkpoint from which a part of a tensor can be read without the rest."""

  def read_window(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
    """Reads a window of a tensor, given by one slice per dimension."""


def place(
  table: Table, source: WindowSource, abstract: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads a checkpoint into sharded arrays; `engine.apply` reads it into arrays on the host.

  The host holds one tensor of the file at a time (the matrix of one layer), and of that only the windows that the
  devices of this process need. Tensors are transposed and cast on the devices, where stacked parameters are filled in
  place. So the devices need memory for the parameters and one tensor. All processes of a mesh must call this together.

  A kernel of stacked layers that has a sibling `kernel_scale` is quantized (`quantized.quantize_kernel`): the devices
  convert the matrix of each layer to values and scales when it is read.

  Args:
    table: Table of the checkpoint's architecture.
    source: The checkpoint.
    abstract: Nested dict of arrays or ShapeDtypeStructs with the shapes and dtypes of the parameters.
    shardings: Nested dict with the same keys and a NamedSharding at each leaf.

  Returns:
    Nested dict of global arrays. Layers are stacked along the first dimension.

  Raises:
    InputError: If the checkpoint does not fit; see `engine.match`. Everything is checked before any tensor is read.
  """
  wanted, where = engine.flatten_tree(abstract), engine.flatten_tree(shardings)
  scales = {f"{path}_scale" for path in wanted} & wanted.keys()
  stored = engine.unflatten_tree({path: value for path, value in wanted.items() if path not in scales})
  placed: dict[str, Array] = {}
  for match in engine.match(table, source, stored):
    value, sharding = wanted[match.ours], where[match.ours]
    tensor = read_sharded(match, source, sharding)
    paths = [match.ours, *({f"{match.ours}_scale"} & scales)]
    if match.layer is None:
      filled = _whole(match.layout, value.dtype, sharding)(tensor)
    else:
      for path in paths:
        if path not in placed:
          placed[path] = _zeros(wanted[path].shape, wanted[path].dtype, where[path])()
      writer = layer_writer if len(paths) == 1 else _quantizing_writer
      filled = writer(match.layout, *(where[path] for path in paths))(
        *(placed[path] for path in paths), tensor, match.layer
      )
    # Without waiting, the host would run ahead of the devices and hold one tensor for every waiting layer.
    placed.update(zip(paths, jax.tree.leaves(jax.block_until_ready(filled)), strict=True))
  return engine.unflatten_tree(placed)


def read_sharded(match: engine.Match, source: WindowSource, sharding: NamedSharding) -> Array:
  """Reads the tensor of a match in the file's shape and dtype, sharded like the parameter that it fills.

  A joined dimension of the tensor is sharded like the outermost of the parameter's dimensions that it joins. So every
  shard is a window of the file.

  Args:
    match: The tensor and its parameter.
    source: The checkpoint.
    sharding: Sharding of the parameter.
  """
  layout = match.layout
  spec = tuple(sharding.spec)[match.layer is not None :]
  theirs = [spec[outer] if outer is not None and outer < len(spec) else None for outer in layout.outer]
  windows: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # Devices with the same window share it.

  def read(index: Any) -> np.ndarray:
    bounds = [cut.indices(size)[:2] for cut, size in zip(index, layout.shape, strict=True)]
    bounds[0] = (bounds[0][0] + layout.start, bounds[0][1] + layout.start)
    key = tuple(bounds)
    if key not in windows:
      windows[key] = source.read_window(match.name, tuple(slice(*cut) for cut in bounds))
    return windows[key]

  return jax.make_array_from_callback(layout.shape, NamedSharding(sharding.mesh, PartitionSpec(*theirs)), read)


# One program is compiled for each layout, dtype and sharding. These are few, because layers are equal. The shardings
# are arguments of jit, because a constraint within the program would return equal shardings that compare as different,
# and each later program would be compiled twice.


@functools.cache
def layer_writer(layout: engine.Layout, sharding: NamedSharding) -> jax.stages.Wrapped:
  """Returns the jitted `(stacked, tensor, layer) -> stacked` that writes the tensor of one layer in place.

  Args:
    layout: Layout of the tensor.
    sharding: Sharding of the stacked parameter.
  """

  def write_layer(stacked: Array, tensor: Array, layer: int) -> Array:
    return lax.dynamic_update_index_in_dim(stacked, layout.to_ours(tensor).astype(stacked.dtype), layer, 0)

  return jax.jit(write_layer, out_shardings=sharding, donate_argnums=0)


@functools.cache
def _quantizing_writer(
  layout: engine.Layout, sharding: NamedSharding, scale_sharding: NamedSharding
) -> jax.stages.Wrapped:
  """Returns the jitted `(values, scales, tensor, layer) -> (values, scales)` that quantizes the tensor of one layer."""

  def write_layer(values: Array, scales: Array, tensor: Array, layer: int) -> tuple[Array, Array]:
    # Both have a dimension of layers and those of the outputs.
    quantized = quantize_kernel(layout.to_ours(tensor), values.ndim - scales.ndim, values.dtype.name)
    return tuple(
      lax.dynamic_update_index_in_dim(stacked, of_layer, layer, 0)
      for stacked, of_layer in zip((values, scales), quantized, strict=True)
    )

  return jax.jit(write_layer, out_shardings=(sharding, scale_sharding), donate_argnums=(0, 1))


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any], sharding: NamedSharding) -> Callable[[], Array]:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _whole(layout: engine.Layout, dtype: np.dtype[Any], sharding: NamedSharding) -> Callable[[Array], Array]:
  return jax.jit(lambda tensor: layout.to_ours(tensor).astype(dtype), out_shardings=sharding)
