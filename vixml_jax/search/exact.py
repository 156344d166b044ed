"""Exact maximum inner product search on the devices, with the labels split over them."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax import sharding
from vixml_jax.array_file import release_pages
from vixml_jax.errors import InputError
from vixml_jax.rounding import next_power_of_two
from vixml_jax.sharded_rows import ShardedRows

LABELS_PER_BLOCK = 65_536
"""Maximum number of labels that a device scores at once."""
QUERIES_PER_CHUNK = 512
"""Number of queries that are scored at once."""
_ROWS_PER_COPY = 65_536  # Number of rows that are copied to a device at once.
_MIN_QUERIES = 8  # Fewer queries take the same time.


class ExactIndex:
  """Label embeddings spread over the devices of a mesh; every search scores all of them.

  Each device holds an equal, contiguous range of the labels. A chunk of queries is sent to all devices, each scores its
  labels block by block with a running top k, and the top k of the devices are merged. Besides the labels, device memory
  holds one array of scores, `[query_chunk, block]`.

  Attributes:
    num_labels: Number of labels that are searched.
  """

  def __init__(
    self,
    embeddings: np.ndarray | jax.Array | ShardedRows,
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

    Scores are computed in float32 at full precision. One program is compiled for each k and each power of two of
    queries below `query_chunk`, so that a single query does not wait for the scores of a full chunk.

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
    scores = np.empty((len(queries), k), np.float32)
    ids = np.empty((len(queries), k), np.int32)
    width = min(self._query_chunk, max(_MIN_QUERIES, next_power_of_two(len(queries))))
    pending = None
    for start in range(0, len(queries), width):
      part = slice(start, start + width)
      mask_of_part = () if mask_of_query is None else (self._put(mask_of_query[part].astype(np.int32), width),)
      result = program(self._labels, self._put(queries[part], width), *placed_masks, *mask_of_part)
      if pending:
        _copy_results(*pending, scores, ids)
      pending = (start, result)  # Copied while the devices work on the next chunk.
    if pending:
      _copy_results(*pending, scores, ids)
    if self._rows is not None:
      ids = np.where(ids < 0, -1, self._rows[ids]).astype(np.int32)
    return scores, ids

  @property
  def _replicated(self) -> NamedSharding:
    return NamedSharding(self._mesh, PartitionSpec())

  def _place(self, embeddings: np.ndarray | jax.Array) -> jax.Array:
    """[L, D] -> [L rounded up, D], padded with zeros and split by rows over all devices."""
    where = NamedSharding(self._mesh, PartitionSpec(self._axes))
    num_rows = math.ceil(self.num_labels / self._mesh.size) * self._mesh.size
    if isinstance(embeddings, jax.Array):
      pad = lambda x: jnp.pad(x, ((0, num_rows - self.num_labels), (0, 0)))
      return jax.jit(pad, out_shardings=where)(embeddings)

    shards = [
      self._place_share(embeddings, device, *index[0].indices(num_rows)[:2])
      for device, index in where.addressable_devices_indices_map((num_rows, self._dim)).items()
      if index is not None
    ]
    return jax.make_array_from_single_device_arrays((num_rows, self._dim), where, shards)

  def _place_share(self, embeddings: np.ndarray, device: jax.Device, first: int, last: int) -> jax.Array:
    """Copies rows to a device; the host needs memory for a block only, memory-mapped files included."""
    share = jnp.zeros((last - first, self._dim), embeddings.dtype, device=device)
    end = min(last, self.num_labels)
    for start in range(first, end, _ROWS_PER_COPY):
      own = slice(start, min(start + _ROWS_PER_COPY, end))
      rows = embeddings[own if self._rows is None else self._rows[own]]
      share = _write_rows(share, jax.device_put(np.asarray(rows), device), np.int32(start - first))
      share.block_until_ready()
      release_pages(embeddings)
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


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(share: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(share, rows, start, axis=0)


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


def block_size(labels_per_device: int, most: int = LABELS_PER_BLOCK) -> int:
  """Returns the number of labels that a device scores at once: equal blocks, so that few labels are scored twice."""
  return math.ceil(labels_per_device / math.ceil(labels_per_device / most))


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
    local = start + jnp.arange(block)
    scores = jnp.where((local >= number * block) & (first + local < num_labels), scores, -jnp.inf)
    if masks is not None:
      block_masks = jax.lax.dynamic_slice_in_dim(masks, start, block, axis=1)
      scores = jnp.where(block_masks[mask_of_query], scores, -jnp.inf)
    values, positions = block_top_k(scores, min(k, block))
    return _merge(best, (values, first + start + positions), k), None

  nothing = (jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32))
  best, _ = jax.lax.scan(step, nothing, jnp.arange(math.ceil(share / block)))
  scores, ids = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in best)
  values, ids = _top_k_with_ids(scores, ids, k)
  return values, jnp.where(values == -jnp.inf, -1, ids)


def _merge(
  left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array], k: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the top k of two lists of (values, ids); the left one has the lower ids and wins ties."""
  values, ids = (jnp.concatenate(pair, axis=1) for pair in zip(left, right, strict=True))
  return _top_k_with_ids(values, ids, k)


def _top_k_with_ids(values: jax.Array, ids: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  values, places = jax.lax.top_k(values, k)
  return values, jnp.take_along_axis(ids, places, axis=1)


def _to_host(queries: np.ndarray | jax.Array, replicated: NamedSharding) -> np.ndarray:
  if isinstance(queries, jax.Array) and not queries.is_fully_addressable:
    queries = jax.jit(lambda x: x, out_shardings=replicated)(queries)
  return np.asarray(queries)


def _copy_results(start: int, result: tuple[jax.Array, jax.Array], scores: np.ndarray, ids: np.ndarray) -> None:
  """Copies the results of the chunk of queries that begins at `start`, without its padding."""
  stop = min(start + len(result[0]), len(scores))
  scores[start:stop] = np.asarray(result[0])[: stop - start]
  ids[start:stop] = np.asarray(result[1])[: stop - start]
