"""Recursive balanced 2-means on device, all clusters of a level at once.

The recursion is that of NGAME (arXiv 2207.04452, section 4). The first two centers of a cluster are two random members.
The half of the members that is closer to the first center is assigned to it and the rest to the second; the centers
become the normalized means of the halves. This is repeated until the mean similarity of members to their center, over
all clusters of the level, improves by less than `bisection.TOLERANCE`. The halves are clusters of the next level.

On the upper levels, rows stay on their devices (`bisection`). Once clusters have at most `GROUP_ROWS` rows, the rows of
each are copied once to one device, which finishes that subtree in contiguous memory.

The result depends neither on the number of devices nor on the order of sums (`row_blocks`).
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.mining.bisection import MAX_LEVELS, bisect_clusters, halve
from vixml_jax.mining.row_blocks import RowShare, fetch_rows, inverse_norms
from vixml_jax.mining.rows import mesh_of, shard_rows
from vixml_jax.rounding import largest_divisor
from vixml_jax.sharding import to_host
from vixml_jax.stages import LONG, stage

BLOCK_ROWS = 4096
"""Largest number of rows that are multiplied at a time, which bounds the temporaries beside the embeddings."""
_MAX_DEVICES = 256  # Up to so many devices, blocks consist of the same rows and the result is the same.
GROUP_ROWS = 16384
"""Largest cluster whose subtree is finished on one device."""
STAGE_LEVELS = 5
"""Levels of a subtree between two rearrangements of its rows; each level doubles the columns of the products."""


def balanced_kmeans(
  embeddings: jax.Array | np.ndarray,
  num_clusters: int,
  *,
  seed: int,
  iterations: int = 50,
  mesh: Mesh | None = None,
  num_rows: int | None = None,
) -> np.ndarray:
  """Splits rows into clusters whose sizes differ by at most one, by recursive balanced 2-means.

  The result is a function of the seed, on up to 256 devices. Rows with equal scores are ordered by their index. It
  needs about `4 * (BLOCK_ROWS + 3 * GROUP_ROWS) * D + 40 * N` bytes beside the embeddings on each device.

  Args:
    embeddings: [N, D] of any float type and length, zeros for a row never seen. On the devices, split by rows, or on
      the host. Rows after the first `num_rows` are padding.
    num_clusters: Number of clusters, a power of two, at most `num_rows`.
    seed: Seed of the first centers.
    iterations: Maximum number of iterations of a level, at least 1.
    mesh: Devices to share the rows among, over all axes of the mesh. The default is the mesh of `embeddings` if they
      are sharded, else one device.
    num_rows: Number of rows to cluster; the default is N.

  Returns:
    int32 [num_rows], the cluster of each row. Clusters `2 * i` and `2 * i + 1` are the halves of one parent.

  Raises:
    ValueError: `num_clusters` is not a power of two or exceeds the number of rows, or `iterations` is below 1.

  Reference:
    NGAME, arXiv 2207.04452, section 4.
  """
  num_rows = len(embeddings) if num_rows is None else num_rows
  if num_clusters < 1 or num_clusters & (num_clusters - 1):
    raise ValueError(f"num_clusters must be a power of two, got {num_clusters}")
  if num_clusters > num_rows:
    raise ValueError(f"{num_clusters} clusters need as many rows, got {num_rows}")
  if iterations < 1:
    raise ValueError(f"iterations must be at least 1, got {iterations}")
  levels = num_clusters.bit_length() - 1
  if levels == 0:
    return np.zeros(num_rows, np.int32)
  mesh = mesh or mesh_of(embeddings)
  rows = shard_rows(embeddings, mesh)
  pairs = draw_pairs(seed, num_rows, levels)
  with stage(f"divide {num_rows:,} rows into {num_clusters:,} clusters", logged=num_rows >= LONG):
    order = to_host(
      _order_by_cluster(
        rows, np.int32(num_rows), pairs, **_static(rows.shape[0], num_rows, levels, iterations), mesh=mesh
      )
    )
  sizes = np.array([num_rows])
  for _ in range(levels):
    sizes = halve(sizes, np)
  clusters = np.empty(num_rows, np.int32)
  clusters[order] = np.repeat(np.arange(num_clusters, dtype=np.int32), sizes)
  return clusters


def lower_kmeans(
  embeddings: jax.ShapeDtypeStruct, num_clusters: int, num_rows: int, mesh: Mesh, iterations: int = 50
) -> jax.stages.Lowered:
  """Lowers the program of `balanced_kmeans` for devices that need not exist; arguments as for `balanced_kmeans`."""
  where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  rows = jax.ShapeDtypeStruct(embeddings.shape, embeddings.dtype, sharding=where)
  levels = num_clusters.bit_length() - 1
  pairs = [jax.ShapeDtypeStruct((2**level, 2), jnp.int32) for level in range(levels)]
  size = jax.ShapeDtypeStruct((), jnp.int32)
  static = _static(rows.shape[0], num_rows, levels, iterations)
  return _order_by_cluster.lower(rows, size, pairs, **static, mesh=mesh)


def _static(padded_rows: int, num_rows: int, levels: int, iterations: int) -> dict[str, int]:
  """Returns the arguments of `_order_by_cluster` that a program is compiled for."""
  return {
    "num_rows": num_rows,
    "top_levels": min(levels, MAX_LEVELS, max(0, _ceil_log2(num_rows) - _ceil_log2(GROUP_ROWS))),
    "iterations": iterations,
    "block": block_rows(padded_rows),
  }


def block_rows(num_rows: int) -> int:
  """Returns the number of rows that are multiplied at a time: a divisor of every device's share.

  Args:
    num_rows: Number of rows with padding, a multiple of 1024.
  """
  return largest_divisor(max(num_rows // _MAX_DEVICES, 1), BLOCK_ROWS)


def draw_pairs(seed: int, num_rows: int, levels: int) -> list[np.ndarray]:
  """Returns int32 [V, 2] for each level: two distinct members, by position, that each of its V clusters starts from."""
  generator = np.random.Generator(np.random.PCG64(seed))
  sizes = np.array([num_rows])
  pairs = []
  for _ in range(levels):
    first = generator.integers(0, sizes)
    second = (first + generator.integers(1, sizes)) % sizes
    pairs.append(np.stack([first, second], axis=1).astype(np.int32))
    sizes = halve(sizes, np)
  return pairs


@functools.partial(jax.jit, static_argnames=("num_rows", "top_levels", "iterations", "block", "mesh"))
def _order_by_cluster(
  embeddings: jax.Array,
  size: jax.typing.ArrayLike,
  pairs: list[Any],
  *,
  num_rows: int,
  top_levels: int,
  iterations: int,
  block: int,
  mesh: Mesh,
) -> jax.Array:
  """Returns the row ids [num_rows] in an order in which every cluster is a contiguous range.

  `size` is `num_rows` as a traced value: a constant would be folded at compile time.
  """
  axes = mesh.axis_names
  arrange = functools.partial(
    _arrange_share, num_rows=num_rows, top_levels=top_levels, iterations=iterations, block=block, axes=axes
  )
  replicated = PartitionSpec()
  return jax.shard_map(
    arrange, mesh=mesh, in_specs=(PartitionSpec(axes), replicated, replicated), out_specs=replicated, check_vma=False
  )(embeddings, size, pairs)


def _arrange_share(
  share: jax.Array,
  size: jax.typing.ArrayLike,
  pairs: list[Any],
  *,
  num_rows: int,
  top_levels: int,
  iterations: int,
  block: int,
  axes: tuple[str, ...],
) -> jax.Array:
  """Splits the upper levels with rows in place, then lets each device finish its part of the subtrees."""
  rows = RowShare(share, inverse_norms(share, block), num_rows, axes, block)
  order, sizes = bisect_clusters(rows, size, pairs[:top_levels], iterations)
  num_devices = lax.axis_size(axes)
  per_device = -(-len(sizes) // num_devices)
  members = _ranges_to_rows(order, sizes, -(-num_rows >> top_levels))
  # Devices without a subtree of their own repeat the last one.
  group_of = jnp.minimum(jnp.arange(num_devices * per_device), len(sizes) - 1)

  def finish(index: jax.Array) -> jax.Array:
    def fetch(device: jax.Array, own: jax.Array) -> jax.Array:
      wanted = members[group_of[device * per_device + index]]
      return jnp.where(device == lax.axis_index(axes), fetch_rows(rows, wanted), own)

    group = group_of[lax.axis_index(axes) * per_device + index]
    empty = jnp.zeros((members.shape[1], share.shape[1]), jnp.float32)
    values = lax.fori_loop(0, num_devices, fetch, empty)
    pairs_of_group = [level[group] for level in _by_group(pairs[top_levels:], len(sizes))]
    inner = _arrange_subtree(values, sizes[group], pairs_of_group, iterations)
    return members[group][inner]

  arranged = lax.all_gather(lax.map(finish, jnp.arange(per_device)), axes, tiled=True)
  return _rows_to_ranges(arranged, sizes, num_rows)


def _arrange_subtree(values: jax.Array, size: jax.Array, pairs: list[jax.Array], iterations: int) -> jax.Array:
  """Returns the row ids [m] of normalized rows [m, D] in the order of their clusters.

  Only the first `size` rows, and the first `size` ids of the result, are meaningful.
  """
  scale = (jnp.arange(len(values)) < size).astype(jnp.float32)
  rows = RowShare(values, scale, len(values), (), min(BLOCK_ROWS, len(values)))
  order, sizes = bisect_clusters(rows, size, pairs[:STAGE_LEVELS], iterations)
  grouped_pairs = _by_group(pairs[STAGE_LEVELS:], len(sizes))
  if not grouped_pairs:
    return order
  members = _ranges_to_rows(order, sizes, -(-len(values) // len(sizes)))
  arrange = functools.partial(_arrange_subtree, iterations=iterations)
  inner = jax.vmap(arrange)(values[members], sizes, grouped_pairs)
  return _rows_to_ranges(jnp.take_along_axis(members, inner, axis=1), sizes, len(values))


def _by_group(pairs: list[jax.Array], num_groups: int) -> list[jax.Array]:
  """Returns each level's pairs [V, 2] as [num_groups, V / num_groups, 2]."""
  return [level.reshape(num_groups, -1, 2) for level in pairs]


def _ranges_to_rows(order: jax.Array, sizes: jax.Array, longest: int) -> jax.Array:
  """Returns V contiguous ranges of `order` as rows [V, longest]; entries after the end of a range are meaningless."""
  starts = jnp.cumsum(sizes) - sizes
  return order[jnp.minimum(starts[:, None] + jnp.arange(longest), len(order) - 1)]


def _rows_to_ranges(rows: jax.Array, sizes: jax.Array, length: int) -> jax.Array:
  """Returns the first `sizes[i]` entries of each row, concatenated, [length]: the inverse of `_ranges_to_rows`."""
  ends = jnp.cumsum(sizes)
  positions = jnp.arange(length)
  row = jnp.minimum(jnp.searchsorted(ends, positions, side="right"), len(sizes) - 1)
  column = positions - (ends - sizes)[row]
  return rows[row, jnp.minimum(column, rows.shape[1] - 1)]


def _ceil_log2(value: int) -> int:
  return (value - 1).bit_length()
