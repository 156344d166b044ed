"""Fills sharded device arrays from a checkpoint, one tensor at a time."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, Protocol

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.typing import Array
from vixml_jax.weights import engine
from vixml_jax.weights.tables import Table


class WindowSource(engine.TensorSource, Protocol):
  """A checkpoint of which a part of a tensor can be read without the rest."""

  def read_window(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
    """What stands in a window of the tensor, one slice a dimension."""


def place(
  table: Table, source: WindowSource, abstract: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads a checkpoint straight into sharded arrays; what `engine.apply` is for the host.

  The host holds one tensor of the file at a time, one layer's matrix, and of that only what this process's devices
  need. A tensor is transposed and cast on the devices, where stacked parameters are filled in place: beside the
  parameters there is room for one tensor. All processes of a mesh have to call this together.

  Args:
    table: of the checkpoint's architecture.
    source: the checkpoint.
    abstract: nested dict of arrays or ShapeDtypeStructs, for the shapes and dtypes wanted.
    shardings: nested dict with the same keys, a NamedSharding at each leaf.

  Returns:
    Nested dict of global arrays, layers stacked in front.

  Raises:
    InputError: the checkpoint does not fit; see `engine.match`. All is checked before any tensor is read.
  """
  wanted, where = engine.flatten_tree(abstract), engine.flatten_tree(shardings)
  placed: dict[str, Array] = {}
  for match in engine.match(table, source, abstract):
    value, sharding = wanted[match.ours], where[match.ours]
    tensor = _tensor(match, source, sharding)
    if match.layer is None:
      filled = _whole(match.layout, value.dtype, sharding)(tensor)
    else:
      stacked = placed.get(match.ours)
      if stacked is None:
        stacked = _zeros(value.shape, value.dtype, sharding)()
      filled = _with_layer(match.layout, sharding)(stacked, tensor, match.layer)
    # Else the host would run ahead of the devices, with a tensor for every layer that waits.
    placed[match.ours] = jax.block_until_ready(filled)
  return engine.unflatten_tree(placed)


def _tensor(match: engine.Match, source: WindowSource, sharding: NamedSharding) -> Array:
  """The tensor of a match, in the file's shape and dtype, cut over the devices where the parameter is.

  A joined dimension is cut like the outer one of those that make it up, which keeps every cut a window of the file.
  """
  layout = match.layout
  spec = tuple(sharding.spec)[match.layer is not None :]
  theirs = [spec[outer] if outer is not None and outer < len(spec) else None for outer in layout.outer]
  windows: dict[tuple, np.ndarray] = {}  # Devices that hold the same window share it.

  def read(index: Any) -> np.ndarray:
    bounds = [cut.indices(size)[:2] for cut, size in zip(index, layout.shape, strict=True)]
    bounds[0] = (bounds[0][0] + layout.start, bounds[0][1] + layout.start)
    key = tuple(bounds)
    if key not in windows:
      windows[key] = source.read_window(match.name, tuple(slice(*cut) for cut in bounds))
    return windows[key]

  return jax.make_array_from_callback(layout.shape, NamedSharding(sharding.mesh, PartitionSpec(*theirs)), read)


# One program for each layout, dtype and sharding: a handful, as layers are alike. The shardings are given to jit, since
# a constraint within would give back equal ones that compare as different, and every later program compiles twice.


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> Callable[[], Array]:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _whole(layout: engine.Layout, dtype: np.dtype, sharding: NamedSharding) -> Callable[[Array], Array]:
  return jax.jit(lambda tensor: layout.to_ours(tensor).astype(dtype), out_shardings=sharding)


@functools.cache
def _with_layer(layout: engine.Layout, sharding: NamedSharding) -> Callable[[Array, Array, int], Array]:
  """Puts one layer's tensor into its place; the old array's memory becomes the new one's."""

  def with_layer(stacked, tensor, layer):
    return lax.dynamic_update_index_in_dim(stacked, layout.to_ours(tensor).astype(stacked.dtype), layer, 0)

  return jax.jit(with_layer, out_shardings=sharding, donate_argnums=0)
