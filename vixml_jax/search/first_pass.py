"""First pass of exact search in bfloat16, and float32 scores of the few labels that can be among the best k.

A CPU with AMX multiplies bfloat16 several times as fast as float32. Rounding changes the score of a label x for a query
q by a bounded amount. With q' and x' rounded, |q.x - q'.x'| <= |q| |x - x'| + |q - q'| |x'| by the inequality of Cauchy
and Schwarz, and both norms of differences are known; sums of D float32 products add at most D u |q| |x| each. The first
pass keeps the C labels of highest rounded score, of which float32 scores are computed. A label that it dropped has a
score of at most s + bound, where s is the lowest rounded score that was kept. If this is below the k-th float32 score,
the k best labels are proven to be those of a search in float32. If it is not, the query is searched in float32.

Float32 scores have the same bits as in the search without a first pass, since both multiply multiples of
`LABELS_MULTIPLE` labels by at least two queries, for which XLA adds the products of every score in the same order.
"""

import functools
import math
from pathlib import Path
import platform
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from vixml_jax import sharding
from vixml_jax.search.top_k import block_top_k, empty_top_k, merge_top_k, top_k_of_shares, top_k_with_ids

LABELS_MULTIPLE = 64
"""Labels that are scored at once must be a multiple of this number."""
_QUERIES_RESCORED = 8  # Number of queries whose candidates are scored together.
_ROUNDOFF = 2.0**-24  # Of float32.
_SAFETY = 1.001  # For the roundoff of the bound itself.


class RoundedLabels(NamedTuple):
  """Labels of the first pass.

  Attributes:
    values: bfloat16 [L rounded up, D], split like the labels.
    norm: float32 [], greatest norm of a label.
    error: float32 [], greatest norm of the difference of a label from its rounded values.
  """

  values: jax.Array
  norm: jax.Array
  error: jax.Array


@jax.jit
def rounded_labels(labels: jax.Array) -> RoundedLabels:
  """Returns labels float32 [L rounded up, D] in bfloat16, in half their memory."""
  values = labels.astype(jnp.bfloat16)
  norms = lambda rows: jnp.sqrt(jnp.max(jnp.sum(jnp.square(rows), axis=1)))
  return RoundedLabels(values, norms(labels), norms(labels - values.astype(jnp.float32)))


def first_pass_pays(mesh: Mesh) -> bool:
  """Returns whether the devices are CPUs that multiply bfloat16 in tiles (AMX)."""
  return sharding.platform_of(mesh) == "cpu" and "amx_bf16" in _cpu_flags()


@functools.cache
def _cpu_flags() -> frozenset[str]:
  """Returns the instruction sets of the CPU that Linux lists."""
  if platform.machine().lower() not in ("x86_64", "amd64"):
    return frozenset()
  try:
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
      flags = next((line for line in lines if line.startswith("flags")), "")
  except OSError:
    return frozenset()
  return frozenset(flags.split())


def num_candidates(k: int) -> int:
  """Returns the number C of labels that the first pass keeps: a multiple of 8, so that 8 queries fill whole blocks."""
  return 8 * math.ceil(max(2 * k, 32) / 8)


def score_bound(queries: jax.Array, norm: jax.Array, error: jax.Array) -> jax.Array:
  """Returns the most that the rounded score of a label differs from its float32 score, float32 [Q].

  Args:
    queries: float32 [Q, D].
    norm: Greatest norm of a label.
    error: Greatest norm of the difference of a label from its rounded values.
  """
  norms = lambda rows: jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))
  rounding = norms(queries - queries.astype(jnp.bfloat16).astype(jnp.float32))
  length = norms(queries)
  # Two sums of D products: the rounded score and the float32 score. The rounded norms are at most `norm + error`.
  sums = 2 * (queries.shape[1] + 1) * _ROUNDOFF * (length + rounding) * (norm + error)
  return _SAFETY * (length * error + rounding * (norm + error) + sums) + jnp.finfo(jnp.float32).tiny * 1e6


@functools.lru_cache(maxsize=64)
def first_pass_program(mesh: Mesh, axes: tuple[str, ...], num_labels: int, k: int, block: int) -> jax.stages.Wrapped:
  """Returns the jitted search with a first pass.

  Its arguments are the labels float32 [L rounded up, D], split by rows over `axes`; the same labels rounded; and a
  chunk of queries float32 [Q, D] on every device, where Q is a multiple of 8. It returns scores and ids [Q, k] and bool
  [Q], whether they are proven to be those of a search in float32.

  Args:
    mesh: Devices.
    axes: Axes of the mesh that split the labels.
    num_labels: Number of labels L.
    k: Number of labels to find for each query.
    block: Number of labels that a device scores at once, a multiple of `LABELS_MULTIPLE`.
  """
  search = functools.partial(_search_share, axes=axes, num_labels=num_labels, k=k, block=block)
  split, whole = PartitionSpec(axes), PartitionSpec()
  in_specs = (split, RoundedLabels._make((split, whole, whole)), whole)
  return jax.jit(jax.shard_map(search, mesh=mesh, check_vma=False, in_specs=in_specs, out_specs=whole))


def _search_share(
  labels: jax.Array,
  rounded: RoundedLabels,
  queries: jax.Array,
  *,
  axes: tuple[str, ...],
  num_labels: int,
  k: int,
  block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the top k of all devices' labels, of which this device holds [n, D], and whether they are proven."""
  share, candidates = len(labels), num_candidates(k)
  first = jax.lax.axis_index(axes) * share
  rounded_queries = queries.astype(jnp.bfloat16)

  def step(best: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    start = jnp.minimum(number * block, share - block)  # The last block overlaps the one before.
    block_labels = jax.lax.dynamic_slice_in_dim(rounded.values, start, block)
    scores = jnp.einsum("qd,ld->ql", rounded_queries, block_labels, preferred_element_type=jnp.float32)
    values, positions = block_top_k(scores, min(candidates, block), number * block - start, num_labels - first - start)
    return merge_top_k(best, (values, start + positions), candidates), None

  best, _ = jax.lax.scan(step, empty_top_k(len(queries), candidates), jnp.arange(math.ceil(share / block)))
  kept, places = best
  ids = jnp.sort(jnp.where(kept == -jnp.inf, share, places), axis=1)  # The lower id wins ties; `share` marks no label.
  scores = jnp.where(ids < share, _score_candidates(labels, jnp.minimum(ids, share - 1), queries), -jnp.inf)
  scores, ids = top_k_with_ids(scores, ids, k)
  # The k-th score of this device is at most that of all devices.
  dropped = kept[:, -1] + score_bound(queries, rounded.norm, rounded.error)
  proven = (kept[:, -1] == -jnp.inf) | (dropped < scores[:, -1])
  return *top_k_of_shares(scores, first + ids, axes, k), jax.lax.pmin(proven.astype(jnp.int32), axes) > 0


def _score_candidates(labels: jax.Array, places: jax.Array, queries: jax.Array) -> jax.Array:
  """Returns float32 scores [Q, C] of the labels at `places` [Q, C], eight queries at a time (see the module)."""
  places = places.reshape(-1, _QUERIES_RESCORED, places.shape[1])
  diagonal = jnp.arange(_QUERIES_RESCORED)

  def score(group: tuple[jax.Array, jax.Array]) -> jax.Array:
    queries, places = group
    scores = jnp.einsum("qd,ld->ql", queries, labels[places.reshape(-1)], precision=jax.lax.Precision.HIGHEST)
    return scores.reshape(len(queries), *places.shape)[diagonal, diagonal]

  scores = jax.lax.map(score, (queries.reshape(-1, _QUERIES_RESCORED, queries.shape[1]), places))
  return scores.reshape(-1, places.shape[2])
