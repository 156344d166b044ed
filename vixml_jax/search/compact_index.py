"""Search over compact codes of the labels on the devices, and exact scores of the few best of them from a file.

The float32 vectors stay where they are, usually in a memory-mapped file, of which only the rows of candidates are read.
With int8 codes, the results are proven to be those of a search in float32 (`vector_codes`); the few queries without
proof are searched in float32 on the host. With bit codes, a label that the codes rank too low is not found.
"""

import collections
from collections.abc import Iterator
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.rounding import next_power_of_two
from vixml_jax.search.exact import block_size, padded_queries, write_rows
from vixml_jax.search.first_pass import LABELS_MULTIPLE
from vixml_jax.search.host_search import search_rows, top_k_positions
from vixml_jax.search.prefixes import ScaledPrefixes, release_rows
from vixml_jax.search.top_k import block_top_k, empty_top_k, merge_top_k, top_k_of_shares
from vixml_jax.search.vector_codes import Extremes, LabelCodes, empty_codes, encode, encode_queries, scores

LABELS_PER_BLOCK = 32_768
"""Maximum number of labels that a device scores at once."""
QUERIES_PER_CHUNK = 128
"""Number of queries in a chunk. XLA multiplies int8 on one core of a CPU, so several chunks are scored at a time."""
_CHUNKS_AT_ONCE = 4
_ROWS_PER_COPY = 65_536
_MEAN_SAMPLE = 65_536  # Number of labels that the mean direction is computed of.
_RESCORED_BYTES = 2**26  # Of the vectors of candidates that are in memory at once.
# Number of candidates for each label to find, rounded up to a power of two so that few programs are compiled, and at
# least. Those of int8 are scored in two steps.
_CANDIDATES = {"int8": 8, "bit": 16}
_LEAST = 64
_NEW_CANDIDATES = (32, 256)  # Numbers of a block's labels that may become candidates, for which programs are compiled.
_FIRST_STEP = 4  # Fraction of the candidates of int8 that is scored first.


class CompactIndex:
  """Codes of the labels spread over the devices of a mesh, in the order of the labels.

  Attributes:
    num_labels: Number of labels that are searched.
    num_unproven: Number of queries so far that were searched in float32 on the host.
  """

  def __init__(
    self,
    vectors: np.ndarray | ScaledPrefixes,
    dtype: str,
    mesh: Mesh | None = None,
    *,
    rows: np.ndarray | None = None,
    block: int = LABELS_PER_BLOCK,
    query_chunk: int = QUERIES_PER_CHUNK,
  ):
    """Encodes the labels block by block and places the codes on the devices.

    Args:
      vectors: Label embeddings float32 [L, D], memory-mapped or not. They are read again by every search.
      dtype: "int8" or "bit".
      mesh: Devices to search on; None uses all devices.
      rows: Ids of the labels to search, ascending; None searches all.
      block: Maximum number of labels that a device scores at once.
      query_chunk: Number of queries in a chunk.

    Raises:
      InputError: There is no label.
    """
    self._vectors, self._dtype = vectors, dtype
    self._rows = rows
    self.num_labels, self.num_unproven = len(vectors) if rows is None else len(rows), 0
    if not self.num_labels:
      raise InputError(f"{self.num_labels} label embeddings: search needs at least 1")
    self._mesh = Mesh(np.asarray(jax.devices()), ("data",)) if mesh is None else mesh
    self._axes = tuple(self._mesh.axis_names)
    self._query_chunk = query_chunk
    self._place()
    self._block = block_size(len(self._codes.scales) // self._mesh.size, block)

  def search(self, queries: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k labels of highest inner product in float32, the lower id first among equal scores.

    Args:
      queries: Queries [Q, D].
      k: Number of labels to return for each query, at least 1.

    Returns:
      Scores float32 [Q, K] in descending order and ids int32 [Q, K]. Score -inf and id -1 fill the places of a query if
      there are fewer labels.
    """
    if k < 1:
      raise ValueError(f"k is {k}, must be at least 1")
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != self._vectors.shape[1]:
      raise InputError(f"queries have shape {queries.shape} but label embeddings have {self._vectors.shape[1]} columns")
    found_scores = np.full((len(queries), k), -np.inf, np.float32)
    found_ids = np.full((len(queries), k), -1, np.int32)
    count = max(next_power_of_two(_CANDIDATES[self._dtype] * k), _LEAST)
    for part, candidates in self._candidates(queries, min(count, self.num_labels)):
      best = self._rescored(queries[part], k, *candidates)
      found_scores[part, : best[0].shape[1]], found_ids[part, : best[1].shape[1]] = best
    release_rows(self._vectors)
    return found_scores, found_ids

  def _candidates(self, queries: np.ndarray, count: int) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
    """Yields chunks of queries, and scores and places [q, C] of their candidates, and the slack of each query."""
    program = _search_program(self._mesh, self._axes, self._dtype, self.num_labels, count, self._block)
    width = min(self._query_chunk, padded_queries(len(queries)))
    pending: collections.deque[tuple[slice, tuple[jax.Array, ...]]] = collections.deque()
    for start in range(0, len(queries), width):
      part = slice(start, min(start + width, len(queries)))
      chunk = np.pad(queries[part], ((0, width - (part.stop - start)), (0, 0)))
      placed = jax.device_put(chunk, NamedSharding(self._mesh, PartitionSpec()))
      pending.append((part, program(self._codes, placed, self._direction, self._extremes)))
      if len(pending) == _CHUNKS_AT_ONCE:  # The devices work on the others while it is scored.
        yield pending[0][0], _on_host(*pending.popleft())
    for started in pending:
      yield started[0], _on_host(*started)

  def _rescored(
    self, queries: np.ndarray, k: int, upper: np.ndarray, places: np.ndarray, slack: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and ids [Q, min(k, C)] of the best candidates [Q, C], or of all labels where there is no proof."""
    count = places.shape[1]
    if self._dtype == "bit":
      return self._best(queries, places, k)
    first = min(max(count // _FIRST_STEP, k), count)
    best_scores, best_ids = self._best(queries, places[:, :first], k)
    if first < self.num_labels:
      above = upper[:, min(first, count - 1)] + slack  # No label that was left out has a higher score.
      left = np.flatnonzero(~_proven(above, best_scores, slack))
      if len(left) and first < count:
        best_scores[left], best_ids[left] = self._best(queries[left], places[left], k)
        if count < self.num_labels:
          left = left[~_proven(upper[left, -1] + slack[left], best_scores[left], slack[left])]
        else:
          left = left[:0]
      if len(left):
        self.num_unproven += len(left)
        best_scores[left], best_ids[left] = search_rows(
          self._vectors, self._ids(np.arange(self.num_labels)), queries[left], best_ids.shape[1]
        )
    return best_scores, best_ids

  def _best(self, queries: np.ndarray, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 scores and ids of the best of candidates [Q, C], all of which exist."""
    places = np.sort(places, axis=1)  # The lower id wins ties.
    ids = self._ids(places).astype(np.int32)
    exact = np.empty(ids.shape, np.float32)
    dim = self._vectors.shape[1]
    size = max(1, _RESCORED_BYTES // (4 * dim * ids.shape[1]))
    for start in range(0, len(ids), size):
      part = slice(start, start + size)
      rows = np.asarray(self._vectors[ids[part].reshape(-1)], np.float32).reshape(*ids[part].shape, dim)
      exact[part] = np.matmul(rows, queries[part, :, None])[:, :, 0]
    best = top_k_positions(exact, min(k, ids.shape[1]))
    return np.take_along_axis(exact, best, axis=1), np.take_along_axis(ids, best, axis=1)

  def _ids(self, places: np.ndarray) -> np.ndarray:
    """Returns the ids of the labels at places among those that are searched."""
    return places if self._rows is None else self._rows[places]

  def _place(self) -> None:
    """Encodes the labels and places their codes on the devices, padded with zeros and split by rows."""
    where = NamedSharding(self._mesh, PartitionSpec(self._axes))
    num_rows = LABELS_MULTIPLE * self._mesh.size * math.ceil(self.num_labels / (LABELS_MULTIPLE * self._mesh.size))
    direction = self._mean_direction()
    shares, extremes = [], []
    for device, index in where.addressable_devices_indices_map((num_rows,)).items():
      assert index is not None
      first, last, _ = index[0].indices(num_rows)
      share = empty_codes(self._dtype, last - first, self._vectors.shape[1], device)
      for start in range(first, min(last, self.num_labels), _ROWS_PER_COPY):
        ids = self._ids(np.arange(start, min(start + _ROWS_PER_COPY, last, self.num_labels)))
        rows, along = (jax.device_put(x, device) for x in (np.asarray(self._vectors[ids], np.float32), direction))
        codes, extreme = encode(self._dtype, rows, along)
        share = LabelCodes(*(write_rows(x, y, np.int32(start - first)) for x, y in zip(share, codes, strict=True)))
        extremes.append(jax.device_get(extreme))
        release_rows(self._vectors)
      shares.append(share)
    join = lambda *parts: jax.make_array_from_single_device_arrays((num_rows, *parts[0].shape[1:]), where, parts)
    self._codes = jax.tree.map(join, *shares)
    constants = direction, Extremes(*np.max(extremes, axis=0))
    self._direction, self._extremes = jax.device_put(constants, NamedSharding(self._mesh, PartitionSpec()))

  def _mean_direction(self) -> np.ndarray:
    """Returns the direction of the mean of the labels, or of some at equal distances, float32 [D]; or zeros."""
    sample = np.linspace(0, self.num_labels - 1, min(_MEAN_SAMPLE, self.num_labels)).astype(np.int64)
    mean = self._vectors[self._ids(sample)].mean(axis=0, dtype=np.float64)
    return (mean / max(np.linalg.norm(mean), 1e-12)).astype(np.float32)


def _on_host(part: slice, results: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
  return tuple(np.asarray(x)[: part.stop - part.start] for x in results)


def _proven(above: np.ndarray, best: np.ndarray, slack: np.ndarray) -> np.ndarray:
  """Returns whether no label that was left out can be among the best.

  Without slack, a query is zero. Its scores are all 0, and its candidates are the lowest ids.
  """
  return (above < best[:, -1]) | (slack == 0)


@functools.lru_cache(maxsize=64)
def _search_program(
  mesh: Mesh, axes: tuple[str, ...], dtype: str, num_labels: int, count: int, block: int
) -> jax.stages.Wrapped:
  """Returns the jitted first pass.

  Its arguments are codes, split by rows over `axes`; and on every device a chunk of queries float32 [Q, D], the mean
  direction and the extremes of the labels. It returns scores and places [Q, count] in descending order of score, and
  slack [Q].
  """
  search = functools.partial(_search_share, axes=axes, dtype=dtype, num_labels=num_labels, count=count, block=block)
  split, whole = PartitionSpec(axes), PartitionSpec()
  in_specs = (LabelCodes._make((split, split, split)), whole, whole, whole)
  return jax.jit(jax.shard_map(search, mesh=mesh, check_vma=False, in_specs=in_specs, out_specs=whole))


def _search_share(
  codes: LabelCodes,
  queries: jax.Array,
  direction: jax.Array,
  extremes: Extremes,
  *,
  axes: tuple[str, ...],
  dtype: str,
  num_labels: int,
  count: int,
  block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the candidates among all devices' labels, of which this device holds n, and the slack."""
  share = len(codes.scales)
  first = jax.lax.axis_index(axes) * share
  encoded = encode_queries(dtype, queries, direction, extremes)

  def step(best: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    start = jnp.minimum(number * block, share - block)  # The last block overlaps the one before.
    found = scores(dtype, encoded, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, block), codes))
    # Few labels of a later block are better than the candidates so far.
    new = jnp.max(jnp.sum(found > best[0][:, -1:], axis=1))
    widths = sorted({min(width, count, block) for width in (*_NEW_CANDIDATES, count)})

    def merged(width: int) -> tuple[jax.Array, jax.Array]:
      values, positions = block_top_k(found, width, number * block - start, num_labels - first - start)
      return merge_top_k(best, (values, first + start + positions), count)

    enough = jnp.searchsorted(jnp.asarray(widths), new)
    branches = [functools.partial(merged, width) for width in widths]
    return jax.lax.switch(jnp.minimum(enough, len(widths) - 1), branches), None

  best, _ = jax.lax.scan(step, empty_top_k(len(queries), count), jnp.arange(math.ceil(share / block)))
  return *top_k_of_shares(*best, axes, count), encoded.slack
