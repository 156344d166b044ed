"""Rows of embeddings that are split over the devices of a mesh: reading and writing them without ever gathering all.

Embeddings of a million labels or queries fit neither a device nor a host process. `ShardedRows` keeps each device's
share on the device. A block of rows is read with `take_rows`, which returns it on every device, and written with
`put_rows`, to which every device contributes nothing but the block. Both cost as much memory as the block.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax import sharding

BLOCK_ROWS = 8192
"""Number of rows that are read, written or copied to the host at a time."""


@dataclasses.dataclass(frozen=True)
class ShardedRows:
  """Rows [n, D] that are split over the devices of a mesh.

  Attributes:
    values: [n rounded up, D], sharded by rows over `data` and `fsdp`. The rows after the first n are padding.
    num_rows: Number of rows n.
  """

  values: jax.Array
  num_rows: int

  def __len__(self) -> int:
    return self.num_rows

  @property
  def shape(self) -> tuple[int, int]:
    """[n, D], without the padding."""
    return self.num_rows, self.values.shape[1]

  @property
  def mesh(self) -> Mesh:
    """The devices."""
    return mesh_of(self.values)

  def take(self, rows: np.ndarray) -> jax.Array:
    """Returns rows by their ids, int [M], as an array [M, D] on every device; zeros for an id of -1."""
    ids = sharding.to_global(np.asarray(rows, np.int32), sharding.named_sharding(self.mesh))
    return take_program(self.values, ids, mesh=self.mesh)

  def select(self, rows: np.ndarray) -> "ShardedRows":
    """Returns some rows, by their ids int [M], as new sharded rows [M, D]."""
    out = zeros(len(rows), self.shape[1], self.mesh, self.values.dtype)
    for start in range(0, len(rows), BLOCK_ROWS):
      block = _padded(rows[start : start + BLOCK_ROWS], min(BLOCK_ROWS, len(rows)))
      places = _padded(np.arange(start, min(start + BLOCK_ROWS, len(rows))), len(block))
      out = put(out, places, self.take(block))
    return out

  def block(self, start: int, size: int) -> jax.Array:
    """Returns rows [size, D] from `start` on, on every device; rows after the last one are zeros."""
    rows = np.arange(start, start + size)
    return self.take(np.where(rows < self.num_rows, rows, -1))

  def blocks(self, size: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the first row and the rows of every block, on the host of every process.

    All processes must iterate together.

    Args:
      size: Number of rows of a block; None for `BLOCK_ROWS`.
    """
    size = min(size or BLOCK_ROWS, max(self.num_rows, 1))
    for start in range(0, self.num_rows, size):
      yield start, np.asarray(self.block(start, size))[: self.num_rows - start]

  def on_host(self) -> np.ndarray:
    """Returns all rows [n, D] on the host of every process, which must have memory for them."""
    out = np.empty(self.shape, self.values.dtype)
    for start, block in self.blocks():
      out[start : start + len(block)] = block
    return out

  def own_shards(self) -> Iterator[tuple[int, int, Iterator[np.ndarray]]]:
    """Yields the shares of this process: number, first row, and blocks of rows on the host.

    The shares of all processes together contain every row once. Padding is left out, so that a share may be empty.
    """
    for shard in self.values.addressable_shards:
      if shard.replica_id == 0:
        first, last, _ = shard.index[0].indices(len(self.values))
        number = first // max(last - first, 1)
        yield number, min(first, self.num_rows), _host_blocks(shard.data, min(last, self.num_rows) - first)

  @property
  def num_shards(self) -> int:
    """Number of shares."""
    return sharding.row_devices(self.mesh)


def zeros(num_rows: int, dim: int, mesh: Mesh, dtype: jax.typing.DTypeLike = jnp.float32) -> ShardedRows:
  """Returns n rows of zeros; every device makes its own."""
  where = sharding.named_sharding(mesh, "query", "vector")
  return ShardedRows(_zeros((sharding.padded_rows(num_rows), dim), jnp.dtype(dtype), where), num_rows)


def put(rows: ShardedRows, ids: np.ndarray, values: jax.Array) -> ShardedRows:
  """Returns rows with others in the places `ids`, int [M], -1 for none; the memory of `rows` is reused.

  Args:
    rows: The rows; not usable afterwards.
    ids: Ids of the rows to replace.
    values: [M, D], on every device.
  """
  placed = sharding.to_global(np.asarray(ids, np.int32), sharding.named_sharding(rows.mesh))
  return dataclasses.replace(rows, values=put_program(rows.values, placed, values, mesh=rows.mesh))


def mesh_of(values: jax.Array) -> Mesh:
  """Returns the mesh that an array is sharded over."""
  where = values.sharding
  assert isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh)
  return where.mesh


def take_rows(values: jax.Array, ids: jax.Array, mesh: Mesh) -> jax.Array:
  """Returns rows [M, D] of a sharded array on every device, within a traced function; zeros for ids outside of it.

  Args:
    values: [rows, D], sharded by rows.
    ids: int32 [M], on every device.
    mesh: The devices.
  """
  rows = sharding.row_axes()

  def share(values: jax.Array, ids: jax.Array) -> jax.Array:
    local = ids - lax.axis_index(rows) * len(values)
    index = jnp.clip(local, 0, len(values) - 1)
    found = jnp.where((local == index)[:, None], values[index], 0)
    return lax.psum(found, rows)

  return _over_rows(share, mesh, in_specs=(PartitionSpec(rows), PartitionSpec()), out_specs=PartitionSpec())(
    values, ids
  )


def put_rows(values: jax.Array, ids: jax.Array, rows: jax.Array, mesh: Mesh) -> jax.Array:
  """Returns a sharded array with rows replaced, within a traced function; ids outside of it are ignored.

  Args:
    values: [n, D], sharded by rows. Donate it, so that its memory is reused.
    ids: int32 [M], distinct apart from those outside, on every device.
    rows: [M, D], on every device.
    mesh: The devices.
  """
  axes = sharding.row_axes()

  def share(values: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    local = ids - lax.axis_index(axes) * len(values)
    # An index after the last row is dropped; a negative one would count from the end.
    local = jnp.where((ids >= 0) & (local >= 0), local, len(values))
    return values.at[local].set(rows.astype(values.dtype), mode="drop")

  split, whole = PartitionSpec(axes), PartitionSpec()
  return _over_rows(share, mesh, in_specs=(split, whole, whole), out_specs=split)(values, ids, rows)


def _over_rows(
  function: Callable[..., jax.Array], mesh: Mesh, *, in_specs: Any, out_specs: Any
) -> Callable[..., jax.Array]:
  # The outputs are equal along the mesh axes that do not split rows, which JAX cannot infer.
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.partial(jax.jit, static_argnames="mesh")
def take_program(values: jax.Array, ids: jax.Array, *, mesh: Mesh) -> jax.Array:
  """The jitted `take_rows`."""
  return take_rows(values, ids, mesh)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def put_program(values: jax.Array, ids: jax.Array, rows: jax.Array, *, mesh: Mesh) -> jax.Array:
  """The jitted `put_rows`, which donates `values`."""
  return put_rows(values, ids, rows, mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, int], dtype: np.dtype, where: NamedSharding) -> jax.Array:
  return lax.with_sharding_constraint(jnp.zeros(shape, dtype), where)


@functools.partial(jax.jit, static_argnums=2)
def _slice(values: jax.Array, start: jax.typing.ArrayLike, size: int) -> jax.Array:
  return lax.dynamic_slice_in_dim(values, start, size)


def _host_blocks(values: jax.Array, num_rows: int) -> Iterator[np.ndarray]:
  """Yields the first rows of an array of one device, block by block."""
  size = min(BLOCK_ROWS, len(values))
  for start in range(0, num_rows, size):
    first = min(start, len(values) - size)
    yield np.asarray(_slice(values, np.int32(first), size))[start - first : num_rows - first]


def _padded(ids: np.ndarray, size: int) -> np.ndarray:
  return np.pad(np.asarray(ids, np.int64), (0, size - len(ids)), constant_values=-1)
