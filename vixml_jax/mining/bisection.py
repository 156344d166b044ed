"""Balanced 2-means of all clusters of a level at once, on device, and of several levels one after another.

Two passes over the rows are made in each iteration: one scores every row against its own cluster, and only these scores
are gathered and sorted; the other adds up the halves.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from vixml_jax.mining.row_blocks import RowShare, fetch_rows, resize, score_rows, sum_rows

TOLERANCE = 1e-4
"""Improvement of the mean similarity below which the iteration ends."""

_SCORE_BITS = 24  # Of the 32 bits of a sort key; the others hold the cluster.
MAX_LEVELS = 32 - _SCORE_BITS
"""Largest number of levels of one call of `bisect_clusters`."""


_LevelState = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # order, cluster, sizes and totals: see `_split`.


def bisect_clusters(
  rows: RowShare, size: jax.typing.ArrayLike, pairs: list[jax.Array], iterations: int
) -> tuple[jax.Array, jax.Array]:
  """Splits the first `size` rows into two halves, the halves into two, and so on.

  Args:
    rows: n of M rows.
    size: Number of rows to split.
    pairs: int32 [V, 2] for each level, the two members that each of its V clusters starts from.
    iterations: Maximum number of iterations of a level.

  Returns:
    Row ids [M] in the order of their clusters, and the sizes [2**levels] of the clusters.
  """
  num_rows = len(rows.values) * (lax.axis_size(rows.axes) if rows.axes else 1)
  # The greatest power of two with which a sum of all rows still fits an int32.
  unit = 2.0 ** (30 - (rows.max_rows - 1).bit_length())
  # Padding forms a cluster after all others, on this level and on all that follow.
  cluster = (rows.first_id() + jnp.arange(len(rows.values)) >= size).astype(jnp.int32)
  sizes = jnp.reshape(size, (1,))
  totals = sum_rows(rows, cluster, cluster == 0, 1, unit)

  def split_level(state: _LevelState, pairs: jax.Array) -> tuple[_LevelState, None]:
    order, cluster, sizes, totals = state
    sizes, totals = resize(sizes, len(pairs)), resize(totals, len(pairs))
    order, in_second, totals = _split(rows, cluster, order, sizes, totals, pairs, unit, iterations)
    return (order, 2 * cluster + in_second, halve(sizes, jnp), totals), None

  state: _LevelState = (jnp.arange(num_rows), cluster, sizes, totals)
  if rows.axes:
    # With many rows, products that are as narrow as the level allows are worth a program for each level.
    for pairs_of_level in pairs:
      state, _ = split_level(state, pairs_of_level)
  elif pairs:
    width = len(pairs[-1])
    state = (state[0], cluster, resize(sizes, 2 * width), resize(totals, 2 * width))
    state, _ = lax.scan(split_level, state, jnp.stack([resize(level, width) for level in pairs]))
  order, _, sizes, _ = state
  return order, sizes


def halve(sizes: Any, numpy: Any) -> Any:
  """Returns the sizes [2 V] of the halves of V clusters; the first half has the odd row.

  >>> import numpy as np
  >>> halve(np.array([7, 4]), np)
  array([4, 3, 2, 2])

  Args:
    sizes: Sizes [V].
    numpy: The module `numpy` or `jax.numpy`, according to the type of `sizes`.
  """
  return numpy.stack([(sizes + 1) // 2, sizes // 2], axis=-1).reshape(-1)


class _SplitState(NamedTuple):
  """State of the iteration of one level.

  Attributes:
    iteration: Number of iterations done.
    before: Mean similarity one iteration earlier.
    similarity: Mean similarity of rows to the center of their half.
    directions: float32 [V, D], difference of the two centers of each cluster.
    order: int32 [M], row ids in the order of the halves.
    in_second: bool [n], whether each row is in the second half of its cluster.
    first_totals: int32 [V, D], sums of the first halves.
  """

  iteration: jax.Array
  before: jax.Array
  similarity: jax.Array
  directions: jax.Array
  order: jax.Array
  in_second: jax.Array
  first_totals: jax.Array


def _split(
  rows: RowShare,
  cluster: jax.Array,
  order: jax.Array,
  sizes: jax.Array,
  totals: jax.Array,
  pairs: jax.Array,
  unit: float,
  iterations: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Splits V clusters by balanced 2-means.

  Args:
    rows: n of M rows.
    cluster: int32 [n], the cluster of each row of the share; V or more for padding.
    order: int32 [M], row ids in the order of their clusters.
    sizes: int32 [V], 0 for a cluster that does not exist yet.
    totals: int32 [V, D], sum of each cluster's rows, times `unit`.
    pairs: int32 [V, 2], the two members that each cluster starts from.
    unit: Factor of sums before they are rounded to integers.
    iterations: Maximum number of iterations.

  Returns:
    Row ids [M] in the order of the halves, whether each row [n] is in the second half, and the totals [2 V, D].
  """
  last_of_first = jnp.cumsum(sizes) - sizes + (sizes + 1) // 2 - 1
  row_id = rows.first_id() + jnp.arange(len(rows.values))

  def improves(state: _SplitState) -> jax.Array:
    return (state.similarity - state.before >= TOLERANCE) & (state.iteration < iterations)

  def step(state: _SplitState) -> _SplitState:
    score = score_rows(rows, cluster, state.directions)
    sort_key = _sort_key(cluster, score)
    sorted_key, order = lax.sort((rows.gather(sort_key), jnp.arange(len(state.order))), num_keys=1, is_stable=True)
    own = jnp.minimum(cluster, len(sizes) - 1)
    bound_key, bound_row = sorted_key[last_of_first][own], order[last_of_first][own]
    in_second = (sort_key > bound_key) | ((sort_key == bound_key) & (row_id > bound_row))
    first_totals = sum_rows(rows, cluster, ~in_second, len(sizes), unit)
    norms = jnp.linalg.norm(_both_halves(first_totals, totals).astype(jnp.float32), axis=-1)
    return _SplitState(
      iteration=state.iteration + 1,
      before=state.similarity,
      similarity=jnp.sum(norms) / (unit * jnp.sum(sizes)),
      directions=_directions(first_totals, totals),
      order=order,
      in_second=in_second,
      first_totals=first_totals,
    )

  state = lax.while_loop(
    improves,
    step,
    _SplitState(
      iteration=jnp.int32(0),
      before=jnp.float32(-jnp.inf),
      similarity=jnp.float32(-2),
      directions=_first_directions(rows, order, sizes, pairs),
      order=order,
      in_second=jnp.zeros(len(cluster), bool),
      first_totals=totals,
    ),
  )
  return state.order, state.in_second, _both_halves(state.first_totals, totals).reshape(-1, totals.shape[1])


def _first_directions(rows: RowShare, order: jax.Array, sizes: jax.Array, pairs: jax.Array) -> jax.Array:
  """Returns the difference [V, D] of two members of each cluster."""
  starts = jnp.cumsum(sizes) - sizes
  first, second = order[starts[:, None] + pairs].T
  return fetch_rows(rows, first) - fetch_rows(rows, second)


def _both_halves(first_totals: jax.Array, totals: jax.Array) -> jax.Array:
  """Returns the sums [V, 2, D] of both halves."""
  return jnp.stack([first_totals, totals - first_totals], axis=1)


def _directions(first_totals: jax.Array, totals: jax.Array) -> jax.Array:
  """Returns the difference [V, D] of the normalized means of the halves."""
  sums = _both_halves(first_totals, totals).astype(jnp.float32)
  norms = jnp.linalg.norm(sums, axis=-1, keepdims=True)
  centers = sums / jnp.where(norms > 0, norms, 1)
  return centers[:, 0] - centers[:, 1]


def _sort_key(cluster: jax.Array, score: jax.Array) -> jax.Array:
  """Returns uint32 keys that sort by cluster, then by descending score, which is from -2 to 2."""
  below_top = (2 - score) * 2.0 ** (_SCORE_BITS - 2)
  low = jnp.clip(below_top, 0, 2**_SCORE_BITS - 1).astype(jnp.uint32)
  return (cluster.astype(jnp.uint32) << _SCORE_BITS) | low
