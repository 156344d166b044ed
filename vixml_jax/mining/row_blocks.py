"""Passes over rows that are split over devices, block by block, whose results do not depend on the number of devices.

Sums over a block are rounded to integers before they are added, so that they are the same in any order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class RowShare(NamedTuple):
  """Rows to cluster, or one device's share of them.

  Attributes:
    values: Rows [n, D] of any float type and length.
    scale: float32 [n], the factor that normalizes each row; 0 for a row of zeros and for padding.
    max_rows: Upper bound on the number of rows of all shares without padding; independent of the number of devices.
    axes: Mesh axes over which the rows are split in contiguous shares; () if all rows are here.
    block: Number of rows to multiply at a time.
  """

  values: jax.Array
  scale: jax.Array
  max_rows: int
  axes: tuple[str, ...]
  block: int

  def first_id(self) -> jax.Array | int:
    """Returns the id of the first row of this share."""
    return lax.axis_index(self.axes) * len(self.values) if self.axes else 0

  def add(self, partial: jax.Array) -> jax.Array:
    """Returns the sum of the values of all shares."""
    return lax.psum(partial, self.axes) if self.axes else partial

  def gather(self, share: jax.Array) -> jax.Array:
    """Returns the values of all shares, concatenated."""
    return lax.all_gather(share, self.axes, tiled=True) if self.axes else share


def inverse_norms(values: jax.Array, block: int) -> jax.Array:
  """Returns the factor float32 [n] that normalizes each row of `values` [n, D]; 0 for a row of zeros."""

  def of_block(values: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(values.astype(jnp.float32), axis=1)
    return jnp.where(norms > 0, 1 / norms, 0)

  return _map_blocks(of_block, len(values), block, values)


def score_rows(rows: RowShare, cluster: jax.Array, directions: jax.Array) -> jax.Array:
  """Returns the inner product float32 [n] of each normalized row with the direction of its cluster.

  Args:
    rows: n rows.
    cluster: int32 [n], the cluster of each row; V or more for padding.
    directions: float32 [V, D].
  """
  column = jnp.minimum(cluster, len(directions) - 1)

  def of_block(values: jax.Array, scale: jax.Array, column: jax.Array) -> jax.Array:
    products = jnp.matmul(values.astype(jnp.float32), directions.T)
    return jnp.take_along_axis(products, column[:, None], axis=1)[:, 0] * scale

  return _map_blocks(of_block, len(cluster), rows.block, rows.values, rows.scale, column)


def sum_rows(rows: RowShare, cluster: jax.Array, chosen: jax.Array, num_clusters: int, unit: float) -> jax.Array:
  """Returns the sum int32 [V, D] of each cluster's chosen normalized rows of all shares, times `unit`.

  Args:
    rows: n rows.
    cluster: int32 [n], the cluster of each row.
    chosen: bool [n], the rows to add.
    num_clusters: Number of clusters V.
    unit: Factor of the sums of a block, which are then rounded to integers.
  """
  column = jnp.where(chosen, cluster, num_clusters)

  def of_block(values: jax.Array, scale: jax.Array, column: jax.Array) -> jax.Array:
    weights = jnp.where(column[:, None] == jnp.arange(num_clusters), scale[:, None], 0)
    total = jnp.matmul(weights.T, values.astype(jnp.float32))
    return jnp.round(total * unit).astype(jnp.int32)

  arrays = (rows.values, rows.scale, column)
  whole, rest = divmod(len(cluster), rows.block)
  total = jnp.zeros((num_clusters, rows.values.shape[1]), jnp.int32)
  if whole:
    add = lambda i, total: total + of_block(*_slices(arrays, i * rows.block, rows.block))
    total = lax.fori_loop(0, whole, add, total)
  if rest:
    total += of_block(*_padded_rest(arrays, rows.block))
  return rows.add(total)


def fetch_rows(rows: RowShare, row_ids: jax.Array) -> jax.Array:
  """Returns normalized rows float32 [k, D] by their ids [k], from whichever device has them."""
  local = row_ids - rows.first_id()
  index = jnp.clip(local, 0, len(rows.values) - 1)
  found = rows.values[index].astype(jnp.float32) * rows.scale[index][:, None]
  return rows.add(jnp.where((local == index)[:, None], found, 0)) if rows.axes else found


def resize(array: jax.Array, length: int) -> jax.Array:
  """Returns the first `length` entries, followed by zeros if there are fewer."""
  array = array[:length]
  return jnp.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1))


def _map_blocks(function: Callable[..., jax.Array], num_rows: int, block: int, *arrays: jax.Array) -> jax.Array:
  """Returns the results [block] of `function` for all blocks of rows, concatenated."""
  whole, rest = divmod(num_rows, block)
  parts = []
  if whole:
    mapped = lax.map(lambda i: function(*_slices(arrays, i * block, block)), jnp.arange(whole))
    parts.append(mapped.reshape(-1))
  if rest:
    parts.append(function(*_padded_rest(arrays, block))[:rest])
  return jnp.concatenate(parts)


def _slices(arrays: Sequence[jax.Array], start: Any, size: int) -> list[jax.Array]:
  return [lax.dynamic_slice_in_dim(array, start, size) for array in arrays]


def _padded_rest(arrays: Sequence[jax.Array], block: int) -> list[jax.Array]:
  """Returns the rows after the last whole block, padded to a block: products of equal shapes round equally."""
  rest = len(arrays[0]) % block
  return [resize(array[-rest:], block) for array in arrays]
