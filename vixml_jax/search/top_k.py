"""Top k of scores on the devices: of wide rows, and of lists with ids."""

import math

import jax
import jax.numpy as jnp


def block_top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the result of `jax.lax.top_k` for wide rows in a fraction of its time.

  `top_k` sorts whole rows on GPU and TPU and scans them with a heap on CPU. Here each row is cut into groups of about
  sqrt(W / k) neighbors and only the k groups of highest maximum are searched: W / group + k * group values in all.

  The top k are in these groups. Suppose that x is not: then k groups precede its group in the order of their maxima,
  and each holds a value that is greater than x, or equal to x at a lower position; so k values precede x.

  Args:
    scores: Scores [Q, W].
    k: Number of values, at most W.

  Returns:
    Values [Q, k] in descending order and positions int32 [Q, k], the lower position first among equal values.
  """
  rows, width = scores.shape
  group = 2 ** round(math.log2(max(width / k, 1)) / 2)
  if group < 4:
    values, positions = jax.lax.top_k(scores, k)
    return values, positions
  scores = jnp.pad(scores, ((0, 0), (0, -width % group)), constant_values=-jnp.inf)
  grouped = scores.reshape(rows, -1, group)
  _, groups = jax.lax.top_k(grouped.max(-1), k)
  groups = jnp.sort(groups, axis=-1)  # Candidates are then in the order of their positions.
  candidates = jnp.take_along_axis(grouped, groups[..., None], axis=1).reshape(rows, k * group)
  values, places = jax.lax.top_k(candidates, k)
  positions = jnp.take_along_axis(groups, places // group, axis=1) * group + places % group
  return values, positions


def empty_top_k(num_queries: int, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the top k of no labels: values float32 [Q, k] of -inf and ids int32 [Q, k] of -1."""
  return jnp.full((num_queries, k), -jnp.inf), jnp.full((num_queries, k), -1, jnp.int32)


def merge_top_k(
  left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array], k: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the top k of two lists of (values, ids); the left one has the lower ids and wins ties."""
  values, ids = (jnp.concatenate(pair, axis=1) for pair in zip(left, right, strict=True))
  return top_k_with_ids(values, ids, k)


def top_k_with_ids(values: jax.Array, ids: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the top k of values [Q, W] with their ids [Q, W]; the first ones among equal values."""
  values, places = jax.lax.top_k(values, k)
  return values, jnp.take_along_axis(ids, places, axis=1)


def top_k_of_shares(values: jax.Array, ids: jax.Array, axes: tuple[str, ...], k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the top k of the lists [Q, W] of all devices, on every device; values of -inf get the id -1."""
  values, ids = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (values, ids))
  values, ids = top_k_with_ids(values, ids, k)
  return values, jnp.where(values == -jnp.inf, -1, ids)
