"""Exact maximum inner product search on the devices, with the labels split over them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.rounding import next_power_of_two
from vixml_jax.search.first_pass import (
  LABELS_MULTIPLE,
  RoundedLabels,
  first_pass_pays,
  first_pass_program,
  num_candidates,
  rounded_labels,
)
from vixml_jax.search.prefixes import ScaledPrefixes, release_rows
from vixml_jax.search.top_k import block_top_k, empty_top_k, merge_top_k, top_k_of_shares
from vixml_jax.sharded_rows import ShardedRows

LABELS_PER_BLOCK = 65_536
"""Maximum number of labels that a device scores at once."""
QUERIES_PER_CHUNK = 512
"""Number of queries that are scored at once."""
_ROWS_PER_COPY = 65_536  # Number of rows that are copied to a device at once.
_MIN_QUERIES = 8  # A program for one query takes half the time, but its scores differ in their last bits.
_PADDED_FROM = 1024  # Labels of a device from which they are padded so that the groups of `block_top_k` fit.
_FIRST_PASS_FROM = 16_384  # Labels of a device from which a first pass pays.
_BLOCK_OF_CANDIDATES = 16  # A first pass keeps at most this fraction of a block.


class ExactIndex:
  """Label embeddings spread over the devices of a mesh; every search scores all of them.

  Each device holds an equal, contiguous range of the labels. A chunk of queries is sent to all devices, each scores its
  labels block by block with a running top k, and the top k of the devices are merged. Besides the labels, device memory
  holds one array of scores, `[query_chunk, block]`.

  On CPUs with AMX, a first pass in bfloat16 finds the labels whose float32 scores are needed, with the same results
  (`first_pass`). From its first use on, it needs half the memory of the labels in addition. It is left out with masks,
  for few labels, and for fewer queries than a chunk, for which it was not found to be faster.

  Attributes:
    num_labels: Number of labels that are searched.
  """

  def __init__(
    self,
    embeddings: np.ndarray | jax.Array | ShardedRows | ScaledPrefixes,
    mesh: Mesh | None = None,
    *,
    rows: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
    block: int = LABELS_PER_BLOCK,
    query_chunk: int = QUERIES_PER_CHUNK,
  ):
    """Places the labels on the devices.

    Args:
      embeddings: Label embeddings [L, D], float32 or bfloat16 (stored as they are, in half the memory). Sharded rows
        are searched where they are, without a copy. Otherwise a NumPy array, memory-mapped or not, the same in all
        processes, or a JAX array with any sharding.
      mesh: Devices to search on; None uses all devices. Sharded rows are searched on their own mesh.
      rows: Ids of the labels to search, ascending; the embeddings must then be a NumPy array, of which only these rows
        are read and placed. Results are still label ids. None searches all labels.
      allowed: bool [L], the labels that may be found; None for all. All labels are scored.
      block: Maximum number of labels that a device scores at once.
      query_chunk: Number of queries that are scored at once.

    Raises:
      InputError: There is no label, or the embeddings are not two-dimensional.
    """
    self._rows = rows
    self.num_labels = len(embeddings) if rows is None else len(rows)
    if len(embeddings.shape) != 2 or self.num_labels == 0:
      raise InputError(
        f"{self.num_labels} label embeddings of shape {embeddings.shape}: search needs [L, D] with L at least 1"
      )
    self._dim = embeddings.shape[1]
    self._query_chunk = query_chunk
    if isinstance(embeddings, ShardedRows):
      self._mesh, self._axes = embeddings.mesh, sharding.row_axes()
      self._labels = embeddings.values
    else:
      self._mesh = Mesh(np.asarray(jax.devices()), ("data",)) if mesh is None else mesh
      self._axes = tuple(self._mesh.axis_names)
      self._labels = self._place(embeddings)
    self._block = block_size(len(self._labels) // math.prod(self._mesh.shape[axis] for axis in self._axes), block)
    self._allowed = None if allowed is None else np.asarray(allowed, bool)[None]
    self._placed_allowed = None if self._allowed is None else self._place_masks(self._allowed)

  def search(
    self,
    queries: np.ndarray | jax.Array,
    k: int,
    masks: np.ndarray | None = None,
    mask_of_query: np.ndarray | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k labels of highest inner product, the lower id first among equal scores.

    Scores are computed in float32 at full precision. For each k one program is compiled for each power of two of
    queries from 8 to `query_chunk`, so that few queries do not wait for a full chunk.

    Args:
      queries: Queries [Q, D], the same in all processes.
      k: Number of labels to return for each query, at least 1.
      masks: bool [G, L], sets of labels that queries may have, by id; None permits all labels. All labels are scored,
        and those outside the mask get -inf. The masks are stored on the devices, so G should be small.
      mask_of_query: int [Q], the mask of each query; required with `masks`.

    Returns:
      Scores float32 [Q, K] in descending order and ids int32 [Q, K], on the host of every process. Score -inf and id -1
      fill the places of a query that may have fewer labels.
    """
    if k < 1:
      raise ValueError(f"k is {k}, must be at least 1")
    if queries.ndim != 2 or queries.shape[1] != self._dim:
      raise InputError(f"queries have shape {queries.shape} but label embeddings have {self._dim} columns")
    queries = _to_host(queries, self._replicated).astype(np.float32)
    placed_masks: tuple[jax.Array, ...] = ()
    if masks is not None:
      placed_masks = (self._place_masks(masks if self._allowed is None else masks & self._allowed),)
    elif self._placed_allowed is not None:
      placed_masks, mask_of_query = (self._placed_allowed,), np.zeros(len(queries), np.int32)
    program = search_program(self._mesh, self._axes, self.num_labels, k, self._block, bool(placed_masks))
    few_candidates = num_candidates(k) <= self._block // _BLOCK_OF_CANDIDATES
    if placed_masks or not few_candidates or len(queries) < self._query_chunk or not self._has_first_pass:
      scores, ids = self._run(program, (self._labels,), queries, placed_masks, mask_of_query)
    else:
      first = first_pass_program(self._mesh, self._axes, self.num_labels, k, self._block)
      scores, ids, proven = self._run(first, (self._labels, self._rounded), queries)
      if not proven.all():
        scores[~proven], ids[~proven] = self._run(program, (self._labels,), queries[~proven])
    if self._rows is not None:
      ids = np.where(ids < 0, -1, self._rows[ids]).astype(np.int32)
    return scores, ids

  def _run(
    self,
    program: jax.stages.Wrapped,
    labels: tuple[Any, ...],
    queries: np.ndarray,
    masks: tuple[jax.Array, ...] = (),
    mask_of_query: np.ndarray | None = None,
  ) -> list[np.ndarray]:
    """Runs a program on chunks of queries and returns its results, of which each has Q rows, on the host."""
    width = min(self._query_chunk, padded_queries(len(queries)))
    results: list[list[np.ndarray]] = []
    pending = None
    for start in range(0, max(len(queries), 1), width):
      part = slice(start, start + width)
      mask_of_part = () if mask_of_query is None else (self._put(mask_of_query[part].astype(np.int32), width),)
      chunk = program(*labels, self._put(queries[part], width), *masks, *mask_of_part)
      if pending is not None:
        results.append([np.asarray(x) for x in pending])
      pending = chunk  # Copied while the devices work on the next chunk.
    assert pending is not None
    results.append([np.asarray(x) for x in pending])
    return [np.concatenate(parts)[: len(queries)] for parts in zip(*results, strict=True)]

  @functools.cached_property
  def _rounded(self) -> RoundedLabels:
    """The labels of the first pass, made when a search first needs them."""
    return rounded_labels(self._labels)

  @functools.cached_property
  def _has_first_pass(self) -> bool:
    whole_blocks = self._block % LABELS_MULTIPLE == 0 and self._query_chunk % _MIN_QUERIES == 0
    large = self._block >= _FIRST_PASS_FROM and self._labels.dtype == jnp.float32
    return whole_blocks and large and first_pass_pays(self._mesh)

  @property
  def _replicated(self) -> NamedSharding:
    return NamedSharding(self._mesh, PartitionSpec())

  def _place(self, embeddings: np.ndarray | jax.Array | ScaledPrefixes) -> jax.Array:
    """[L, D] -> [L rounded up, D], padded with zeros and split by rows over all devices."""
    where = NamedSharding(self._mesh, PartitionSpec(self._axes))
    multiple = LABELS_MULTIPLE if self.num_labels >= _PADDED_FROM * self._mesh.size else 1
    num_rows = math.ceil(self.num_labels / (multiple * self._mesh.size)) * multiple * self._mesh.size
    if isinstance(embeddings, jax.Array):
      pad = lambda x: jnp.pad(x, ((0, num_rows - self.num_labels), (0, 0)))
      return jax.jit(pad, out_shardings=where)(embeddings)

    shards = [
      self._place_share(embeddings, device, *index[0].indices(num_rows)[:2])
      for device, index in where.addressable_devices_indices_map((num_rows, self._dim)).items()
      if index is not None
    ]
    return jax.make_array_from_single_device_arrays((num_rows, self._dim), where, shards)

  def _place_share(
    self, embeddings: np.ndarray | ScaledPrefixes, device: jax.Device, first: int, last: int
  ) -> jax.Array:
    """Copies rows to a device; the host needs memory for a block only, memory-mapped files included."""
    share = jnp.zeros((last - first, self._dim), embeddings.dtype, device=device)
    end = min(last, self.num_labels)
    for start in range(first, end, _ROWS_PER_COPY):
      own = slice(start, min(start + _ROWS_PER_COPY, end))
      rows = embeddings[own if self._rows is None else self._rows[own]]
      share = write_rows(share, jax.device_put(np.asarray(rows), device), np.int32(start - first))
      share.block_until_ready()
      release_rows(embeddings)
    return share

  def _place_masks(self, masks: np.ndarray) -> jax.Array:
    """[G, L] -> [G', L rounded up], split like the labels; G' is a power of two, so that few programs are compiled."""
    if self._rows is not None:
      masks = masks[:, self._rows]
    padding = (next_power_of_two(len(masks)) - len(masks), len(self._labels) - self.num_labels)
    masks = np.pad(masks, ((0, padding[0]), (0, padding[1])))
    where = NamedSharding(self._mesh, PartitionSpec(None, self._axes))
    return jax.make_array_from_callback(masks.shape, where, lambda index: masks[index])

  def _put(self, chunk: np.ndarray, width: int) -> jax.Array:
    """Copies a chunk of queries to all devices, padded so that all chunks run the same program."""
    chunk = np.pad(chunk, [(0, width - len(chunk)), *[(0, 0)] * (chunk.ndim - 1)])
    return jax.make_array_from_callback(chunk.shape, self._replicated, lambda index: chunk[index])


def padded_queries(number: int) -> int:
  """Returns the number of queries of the program that searches for `number` queries: 8, 16, 32, ..."""
  return max(_MIN_QUERIES, next_power_of_two(number))


@functools.partial(jax.jit, donate_argnums=0)
def write_rows(share: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
  """Returns an array with rows replaced from `start` on; the memory of the array is reused."""
  return jax.lax.dynamic_update_slice_in_dim(share, rows, start, axis=0)


def block_size(labels_per_device: int, most: int = LABELS_PER_BLOCK) -> int:
  """Returns the number of labels that a device scores at once: equal blocks, so that few labels are scored twice."""
  equal = math.ceil(labels_per_device / math.ceil(labels_per_device / most))
  return min(LABELS_MULTIPLE * math.ceil(equal / LABELS_MULTIPLE), labels_per_device)


@functools.lru_cache(maxsize=64)
def search_program(
  mesh: Mesh, axes: tuple[str, ...], num_labels: int, k: int, block: int, masked: bool
) -> jax.stages.Wrapped:
  """Returns the jitted search; it is cached, so that the index of the next evaluation compiles nothing.

  Its arguments are the labels [L rounded up, D], split by rows over `axes`, and a chunk of queries [Q, D] on every
  device; if `masked`, also masks [G, L rounded up], split like the labels, and the mask of each query, int32 [Q]. It
  returns scores and ids [Q, k].

  Args:
    mesh: Devices, which need not exist if the program is only compiled.
    axes: Axes of the mesh that split the labels.
    num_labels: Number of labels L.
    k: Number of labels to find for each query.
    block: Number of labels that a device scores at once.
    masked: Whether queries have masks.
  """
  search = functools.partial(_search_share, axes=axes, num_labels=num_labels, k=k, block=block)
  whole = PartitionSpec()
  in_specs = (PartitionSpec(axes), whole, PartitionSpec(None, axes), whole)
  # The results are equal on all devices after the final all_gather, which JAX cannot infer.
  return jax.jit(
    jax.shard_map(search, mesh=mesh, check_vma=False, in_specs=in_specs if masked else in_specs[:2], out_specs=whole)
  )


def _search_share(
  labels: jax.Array,
  queries: jax.Array,
  masks: jax.Array | None = None,
  mask_of_query: jax.Array | None = None,
  *,
  axes: tuple[str, ...],
  num_labels: int,
  k: int,
  block: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the top k of all devices' labels, of which this device holds [n, D]."""
  share = len(labels)
  first = jax.lax.axis_index(axes) * share

  def step(best: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    start = jnp.minimum(number * block, share - block)  # The last block overlaps the one before.
    block_labels = jax.lax.dynamic_slice_in_dim(labels, start, block)
    scores = jnp.einsum("qd,ld->ql", queries, block_labels.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if masks is not None:
      block_masks = jax.lax.dynamic_slice_in_dim(masks, start, block, axis=1)
      scores = jnp.where(block_masks[mask_of_query], scores, -jnp.inf)
    values, positions = block_top_k(scores, min(k, block), number * block - start, num_labels - first - start)
    return merge_top_k(best, (values, first + start + positions), k), None

  best, _ = jax.lax.scan(step, empty_top_k(len(queries), k), jnp.arange(math.ceil(share / block)))
  return top_k_of_shares(*best, axes, k)


def _to_host(queries: np.ndarray | jax.Array, replicated: NamedSharding) -> np.ndarray:
  if isinstance(queries, jax.Array) and not queries.is_fully_addressable:
    queries = jax.jit(lambda x: x, out_shardings=replicated)(queries)
  return np.asarray(queries)
