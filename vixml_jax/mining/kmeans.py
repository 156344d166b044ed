"""Recursive balanced 2-means on device, all clusters of a level at once.

The recursion is NGAME's (arXiv 2207.04452, section 4): two random members are a cluster's first
centers, the half of the members that lies closer to the first center goes to it, the rest to the
second, the centers become the normalized means of the halves, and so on until the mean
similarity of members to their center improves by less than `TOLERANCE`, averaged over the
clusters that are split side by side.

Rows stay where they are, sharded or not, for the upper levels: a pass over them scores every row
against its own cluster and only those scores are gathered and sorted, another pass adds up the
halves. Once clusters are small (`GROUP_ROWS`), each one's rows are fetched once, to one device,
which finishes that subtree out of contiguous memory.

Sums over blocks of rows are rounded to integers before they are added, so that they come out the
same in any order: the result does not depend on the number of devices, and atomics cannot
make two runs differ.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from vixml_jax.mining.rows import mesh_of, shard_rows
from vixml_jax.sharding import to_host

TOLERANCE = 1e-4
# Rows that are multiplied at a time: bounds the temporaries beside the embeddings.
BLOCK_ROWS = 4096
# Clusters of at most this many rows are finished on one device.
GROUP_ROWS = 16384
# Levels over rows in place: a sort key has 8 bits for the cluster, hence at most 8.
MAX_TOP_LEVELS = 8
# Levels between two rearrangements of a subtree. Each level doubles the columns of the products.
STAGE_LEVELS = 5
_SCORE_BITS = 24


class _Rows(NamedTuple):
  """Rows to cluster; the device's share of them when `axes` names mesh axes.

  Attributes:
    values: [n, D].
    scale: f32 [n], what normalizes each row; 0 for a row of zeros and for padding.
    most: rows of all shares that are no padding, at most; the same on any number of devices.
    axes: mesh axes over which rows are split in contiguous shares, or ().
    block: rows to multiply at a time.
  """

  values: jax.Array
  scale: jax.Array
  most: int
  axes: tuple[str, ...]
  block: int

  def offset(self):
    """Row id of the first row of this share."""
    return lax.axis_index(self.axes) * len(self.values) if self.axes else 0

  def add(self, partial: jax.Array) -> jax.Array:
    """Sum of what every share holds."""
    return lax.psum(partial, self.axes) if self.axes else partial

  def gather(self, share: jax.Array) -> jax.Array:
    """All shares end to end."""
    return lax.all_gather(share, self.axes, tiled=True) if self.axes else share


def balanced_kmeans(
  embeddings: jax.Array | np.ndarray,
  num_clusters: int,
  *,
  seed: int,
  iterations: int = 50,
  mesh: Mesh | None = None,
  num_rows: int | None = None,
) -> np.ndarray:
  """Splits rows into clusters of equal size (to within one) by recursive balanced 2-means.

  Deterministic for a seed, whatever the number of devices. Rows with equal scores are told apart
  by their index. Needs about `4 * (BLOCK_ROWS + 3 * GROUP_ROWS) * D + 40 * N` bytes beside the
  embeddings on each device, and a padded copy of them where there is more than one device and
  their number is no multiple of `BLOCK_ROWS` times devices.

  Args:
    embeddings: [N, D], any float type; of any length, zero for a row never seen. Sharded over
      rows or not. N may be larger than `num_rows`: what follows is padding.
    num_clusters: a power of two, at most `num_rows`.
    seed: of the initial centers.
    iterations: most iterations of one level, at least 1.
    mesh: devices to share the rows among, over all axes of the mesh; by default that of
      `embeddings` where they are sharded, else one device.
    num_rows: rows to cluster; N by default.

  Returns:
    int32 [num_rows], the cluster of each row. Clusters `2i` and `2i + 1` are halves of one parent.

  Raises:
    ValueError: when `num_clusters` is no power of two or exceeds the number of rows, or
      `iterations` is below 1.

  Reference:
    NGAME, arXiv 2207.04452.
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
  top_levels = min(levels, MAX_TOP_LEVELS, max(0, _ceil_log2(num_rows) - _ceil_log2(GROUP_ROWS)))
  order = _order_by_cluster(
    shard_rows(embeddings, mesh, BLOCK_ROWS),
    np.int32(num_rows),
    _draw_pairs(seed, num_rows, levels),
    num_rows=num_rows,
    top_levels=top_levels,
    iterations=iterations,
    mesh=mesh,
  )
  sizes = np.array([num_rows])
  for _ in range(levels):
    sizes = _halve(sizes, np)
  clusters = np.empty(num_rows, np.int32)
  clusters[to_host(order)] = np.repeat(np.arange(num_clusters, dtype=np.int32), sizes)
  return clusters


def _draw_pairs(seed: int, num_rows: int, levels: int) -> list[np.ndarray]:
  """For each level, which two distinct members, int32 [V, 2], each of its V clusters starts from."""
  generator = np.random.Generator(np.random.PCG64(seed))
  sizes = np.array([num_rows])
  pairs = []
  for _ in range(levels):
    first = generator.integers(0, sizes)
    second = (first + generator.integers(1, sizes)) % sizes
    pairs.append(np.stack([first, second], axis=1).astype(np.int32))
    sizes = _halve(sizes, np)
  return pairs


@functools.partial(jax.jit, static_argnames=("num_rows", "top_levels", "iterations", "mesh"))
def _order_by_cluster(embeddings, size, pairs, *, num_rows, top_levels, iterations, mesh) -> jax.Array:
  """Row ids [num_rows] so that every cluster is a contiguous range.

  `size` is `num_rows` again, as a traced value: a constant would be folded at compile time.
  """
  axes = mesh.axis_names
  arrange = functools.partial(
    _arrange_shares, num_rows=num_rows, top_levels=top_levels, iterations=iterations, axes=axes
  )
  replicated = PartitionSpec()
  return jax.shard_map(
    arrange, mesh=mesh, in_specs=(PartitionSpec(axes), replicated, replicated), out_specs=replicated, check_vma=False
  )(embeddings, size, pairs)


def _arrange_shares(share, size, pairs, *, num_rows, top_levels, iterations, axes) -> jax.Array:
  """Upper levels over rows in place, then each device finishes its part of the subtrees."""
  scale = _map_blocks(_inverse_norms, len(share), BLOCK_ROWS, share)
  rows = _Rows(share, scale, num_rows, axes, BLOCK_ROWS)
  order, sizes = _subdivide(rows, size, pairs[:top_levels], iterations)
  num_devices = lax.axis_size(axes)
  per_device = -(-len(sizes) // num_devices)
  members = _members(order, sizes, -(-num_rows >> top_levels))
  # Where devices do not divide the groups, the last ones repeat the last group.
  group_of = jnp.minimum(jnp.arange(num_devices * per_device), len(sizes) - 1)

  def finish(index):
    def fetch(device, mine):
      wanted = members[group_of[device * per_device + index]]
      return jnp.where(device == lax.axis_index(axes), _fetch(rows, wanted), mine)

    group = group_of[lax.axis_index(axes) * per_device + index]
    empty = jnp.zeros((members.shape[1], share.shape[1]), jnp.float32)
    values = lax.fori_loop(0, num_devices, fetch, empty)
    pairs_of_group = [level[group] for level in _by_group(pairs[top_levels:], len(sizes))]
    inner = _arrange(values, sizes[group], pairs_of_group, iterations)
    return members[group][inner]

  arranged = lax.all_gather(lax.map(finish, jnp.arange(per_device)), axes, tiled=True)
  return _flatten(arranged, sizes, num_rows)


def _by_group(pairs, num_groups: int):
  """Each level's pairs [V, 2] as [num_groups, V / num_groups, 2]."""
  return [level.reshape(num_groups, -1, 2) for level in pairs]


def _arrange(values, size, pairs, iterations: int) -> jax.Array:
  """Row ids [m] of `values` [m, D], normalized, in the order of their clusters.

  Only the first `size` rows count, and only that many row ids of the result.
  """
  scale = (jnp.arange(len(values)) < size).astype(jnp.float32)
  rows = _Rows(values, scale, len(values), (), min(BLOCK_ROWS, len(values)))
  order, sizes = _subdivide(rows, size, pairs[:STAGE_LEVELS], iterations)
  pairs = _by_group(pairs[STAGE_LEVELS:], len(sizes))
  if not pairs:
    return order
  members = _members(order, sizes, -(-len(values) // len(sizes)))
  arrange = functools.partial(_arrange, iterations=iterations)
  inner = jax.vmap(arrange)(values[members], sizes, pairs)
  return _flatten(jnp.take_along_axis(members, inner, axis=1), sizes, len(values))


def _members(order, sizes, longest: int) -> jax.Array:
  """Row ids [V, longest] of V contiguous ranges of `order`; beyond a range's end they are no matter."""
  starts = jnp.cumsum(sizes) - sizes
  return order[jnp.minimum(starts[:, None] + jnp.arange(longest), len(order) - 1)]


def _flatten(members, sizes, length: int) -> jax.Array:
  """Inverse of `_members`: the ranges end to end, [length]."""
  ends = jnp.cumsum(sizes)
  positions = jnp.arange(length)
  group = jnp.minimum(jnp.searchsorted(ends, positions, side="right"), len(sizes) - 1)
  within = positions - (ends - sizes)[group]
  return members[group, jnp.minimum(within, members.shape[1] - 1)]


def _subdivide(rows: _Rows, size, pairs, iterations: int):
  """Splits the first `size` rows once for each level of `pairs`.

  Returns:
    row ids [M] in the order of their clusters, and the sizes [2**levels] of the clusters.
  """
  num_rows = len(rows.values) * (lax.axis_size(rows.axes) if rows.axes else 1)
  # The largest power of two by which a sum of all rows still fits an int32.
  unit = 2.0 ** (30 - _ceil_log2(rows.most))
  # Padding is a cluster of its own behind all others, at this level and each that follows.
  node = (rows.offset() + jnp.arange(len(rows.values)) >= size).astype(jnp.int32)
  sizes = jnp.reshape(size, (1,))
  totals = _sum_rows(rows, node, node == 0, 1, unit)

  def split(state, pairs):
    order, node, sizes, totals = state
    sizes, totals = _resize(sizes, len(pairs)), _resize(totals, len(pairs))
    order, second, totals = _split(rows, node, order, sizes, totals, pairs, unit, iterations)
    return (order, 2 * node + second, _halve(sizes, jnp), totals), None

  state = (jnp.arange(num_rows), node, sizes, totals)
  if rows.axes:
    # Many rows: products as narrow as the level allows are worth a program for each level.
    for pairs_of_level in pairs:
      state, _ = split(state, pairs_of_level)
  elif pairs:
    width = len(pairs[-1])
    state = (*state[:2], _resize(sizes, 2 * width), _resize(totals, 2 * width))
    state, _ = lax.scan(split, state, jnp.stack([_resize(level, width) for level in pairs]))
  order, _, sizes, _ = state
  return order, sizes


def _resize(array, length: int) -> jax.Array:
  """The first `length` entries, followed by zeros where there are fewer."""
  array = array[:length]
  return jnp.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1))


def _split(rows: _Rows, node, order, sizes, totals, pairs, unit: float, iterations: int):
  """Balanced 2-means of V clusters at once.

  Args:
    rows: n of M rows.
    node: int32 [n], the cluster of each row of the share; V or more for padding.
    order: int32 [M], row ids in the order of their clusters.
    sizes: int32 [V], 0 for a cluster that does not exist yet.
    totals: int32 [V, D], sum of each cluster's rows in units of `1 / unit`.
    pairs: int32 [V, 2], the members that each cluster starts from.
    unit: what sums are multiplied by.
    iterations: the most.

  Returns:
    order [M] of the halves, which half [n] each row is in, and the totals [2 V, D] of the halves.
  """
  last_of_first = jnp.cumsum(sizes) - sizes + (sizes + 1) // 2 - 1
  row_id = rows.offset() + jnp.arange(len(rows.values))

  def improves(state):
    return (state.similarity - state.before >= TOLERANCE) & (state.iteration < iterations)

  def step(state):
    score = _score_rows(rows, node, state.directions)
    sort_key = _sort_key(node, score)
    sorted_key, order = lax.sort((rows.gather(sort_key), jnp.arange(len(state.order))), num_keys=1, is_stable=True)
    mine = jnp.minimum(node, len(sizes) - 1)
    bound_key, bound_row = sorted_key[last_of_first][mine], order[last_of_first][mine]
    second = (sort_key > bound_key) | ((sort_key == bound_key) & (row_id > bound_row))
    halves = _sum_rows(rows, node, ~second, len(sizes), unit)
    norms = jnp.linalg.norm(_both(halves, totals).astype(jnp.float32), axis=-1)
    return _Split(
      iteration=state.iteration + 1,
      before=state.similarity,
      similarity=jnp.sum(norms) / (unit * jnp.sum(sizes)),
      directions=_directions(halves, totals),
      order=order,
      second=second,
      halves=halves,
    )

  state = lax.while_loop(
    improves,
    step,
    _Split(
      iteration=jnp.int32(0),
      before=jnp.float32(-jnp.inf),
      similarity=jnp.float32(-2),
      directions=_first_directions(rows, order, sizes, pairs),
      order=order,
      second=jnp.zeros(len(node), bool),
      halves=totals,
    ),
  )
  return state.order, state.second, _both(state.halves, totals).reshape(-1, totals.shape[1])


class _Split(NamedTuple):
  """State of the iteration; `halves` are the sums [V, D] of the first halves."""

  iteration: jax.Array
  before: jax.Array
  similarity: jax.Array
  directions: jax.Array
  order: jax.Array
  second: jax.Array
  halves: jax.Array


def _first_directions(rows: _Rows, order, sizes, pairs) -> jax.Array:
  """Difference [V, D] of two members of each cluster."""
  starts = jnp.cumsum(sizes) - sizes
  first, second = order[starts[:, None] + pairs].T
  return _fetch(rows, first) - _fetch(rows, second)


def _both(halves, totals) -> jax.Array:
  """Sums [V, 2, D] of both halves."""
  return jnp.stack([halves, totals - halves], axis=1)


def _directions(halves, totals) -> jax.Array:
  """Difference [V, D] of the normalized means of the halves."""
  centers = _normalize(_both(halves, totals).astype(jnp.float32))
  return centers[:, 0] - centers[:, 1]


def _sort_key(node, score) -> jax.Array:
  """uint32 that sorts by cluster, then by descending score (which lies within -2..2)."""
  below_top = (2 - score) * 2.0 ** (_SCORE_BITS - 2)
  low = jnp.clip(below_top, 0, 2**_SCORE_BITS - 1).astype(jnp.uint32)
  return (node.astype(jnp.uint32) << _SCORE_BITS) | low


def _score_rows(rows: _Rows, node, directions) -> jax.Array:
  """Product f32 [n] of each row with the direction [V, D] of its cluster."""
  column = jnp.minimum(node, len(directions) - 1)

  def block(values, scale, column):
    products = jnp.matmul(values.astype(jnp.float32), directions.T)
    return jnp.take_along_axis(products, column[:, None], axis=1)[:, 0] * scale

  return _map_blocks(block, len(node), rows.block, rows.values, rows.scale, column)


def _sum_rows(rows: _Rows, node, chosen, num_nodes: int, unit: float) -> jax.Array:
  """Sum of the chosen rows of each cluster over all shares, int32 [V, D], times `unit`."""
  column = jnp.where(chosen, node, num_nodes)

  def block(values, scale, column):
    weights = jnp.where(column[:, None] == jnp.arange(num_nodes), scale[:, None], 0)
    total = jnp.matmul(weights.T, values.astype(jnp.float32))
    return jnp.round(total * unit).astype(jnp.int32)

  arrays = (rows.values, rows.scale, column)
  whole, rest = divmod(len(node), rows.block)
  total = jnp.zeros((num_nodes, rows.values.shape[1]), jnp.int32)
  if whole:
    total = lax.fori_loop(0, whole, lambda i, total: total + block(*_slices(arrays, i * rows.block, rows.block)), total)
  if rest:
    total += block(*_padded_rest(arrays, rows.block))
  return rows.add(total)


def _map_blocks(function: Callable, num_rows: int, block: int, *arrays) -> jax.Array:
  """`function` of blocks of rows, its results [block] end to end."""
  whole, rest = divmod(num_rows, block)
  parts = []
  if whole:
    mapped = lax.map(lambda i: function(*_slices(arrays, i * block, block)), jnp.arange(whole))
    parts.append(mapped.reshape(-1))
  if rest:
    parts.append(function(*_padded_rest(arrays, block))[:rest])
  return jnp.concatenate(parts)


def _slices(arrays, start, size: int):
  return [lax.dynamic_slice_in_dim(array, start, size) for array in arrays]


def _padded_rest(arrays, block: int):
  """What whole blocks leave over, padded to a block: equal shapes round equally."""
  rest = len(arrays[0]) % block
  return [_resize(array[-rest:], block) for array in arrays]


def _fetch(rows: _Rows, row_ids) -> jax.Array:
  """Normalized rows f32 [k, D] by their ids, from whichever device has them."""
  local = row_ids - rows.offset()
  index = jnp.clip(local, 0, len(rows.values) - 1)
  found = rows.values[index].astype(jnp.float32) * rows.scale[index][:, None]
  return rows.add(jnp.where((local == index)[:, None], found, 0)) if rows.axes else found


def _inverse_norms(values) -> jax.Array:
  norms = jnp.linalg.norm(values.astype(jnp.float32), axis=1)
  return jnp.where(norms > 0, 1 / norms, 0)


def _normalize(values) -> jax.Array:
  norms = jnp.linalg.norm(values, axis=-1, keepdims=True)
  return values / jnp.where(norms > 0, norms, 1)


def _halve(sizes, numpy):
  """Sizes of the halves, the first of which takes the odd row."""
  return numpy.stack([(sizes + 1) // 2, sizes // 2], axis=-1).reshape(-1)


def _ceil_log2(value: int) -> int:
  return (value - 1).bit_length()
