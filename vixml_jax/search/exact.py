"""Exact maximum inner product search on the devices, with the labels sharded over all of them."""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.rounding import next_power_of_two

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
    embeddings: np.ndarray | jax.Array,
    mesh: Mesh | None = None,
    *,
    rows: np.ndarray | None = None,
    block: int = 65_536,
    query_chunk: int = 512,
  ):
    """Places the labels on the devices.

    Args:
      embeddings: Label embeddings [L, D], float32 or bfloat16 (stored as they are, in half the memory). A NumPy array,
        memory-mapped or not, or a JAX array with any sharding. NumPy arrays must be the same in all processes.
      mesh: Devices to search on; None uses all devices.
      rows: Ids of the labels to search, ascending; the embeddings must then be a NumPy array, of which only these rows
        are read and placed. Results are still label ids. None searches all labels.
      block: Maximum number of labels that a device scores at once.
      query_chunk: Number of queries that are scored at once.

    Raises:
      InputError: There is no label, or the embeddings are not two-dimensional.
    """
    self._rows = rows
    self.num_labels = len(embeddings) if rows is None else len(rows)
    if embeddings.ndim != 2 or self.num_labels == 0:
      raise InputError(
        f"{self.num_labels} label embeddings of shape {embeddings.shape}: search needs [L, D] with L at least 1"
      )
    self._dim = embeddings.shape[1]
    self._mesh = Mesh(np.asarray(jax.devices()), ("data",)) if mesh is None else mesh
    self._query_chunk = query_chunk
    per_device = math.ceil(self.num_labels / self._mesh.size)
    self._num_blocks = math.ceil(per_device / block)
    # With equal blocks, at most `_num_blocks` rows of a device are padding.
    self._block = math.ceil(per_device / self._num_blocks)
    self._labels = self._place(embeddings)

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
    program = _compiled_search(self._mesh, self.num_labels, k, masks is not None)
    placed_masks = () if masks is None else (self._place_masks(masks),)
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
    """[L, D] -> [devices * blocks, block, D], padded with zeros and sharded along the first axis."""
    sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    num_blocks, block = self._mesh.size * self._num_blocks, self._block
    padding = num_blocks * block - self.num_labels
    shape = (num_blocks, block, self._dim)
    if isinstance(embeddings, jax.Array):
      pad = lambda x: jnp.pad(x, ((0, padding), (0, 0))).reshape(shape)
      return jax.jit(pad, out_shardings=sharding)(embeddings)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      first, last, _ = index[0].indices(num_blocks)
      own = slice(first * block, last * block)
      rows = np.asarray(embeddings[own if self._rows is None else self._rows[own]])
      rows = np.pad(rows, ((0, (last - first) * block - len(rows)), (0, 0)))
      return rows.reshape(last - first, block, self._dim)

    return jax.make_array_from_callback(shape, sharding, shard)

  def _place_masks(self, masks: np.ndarray) -> jax.Array:
    """[G, L] -> [devices * blocks, G', block], sharded like the labels; G' is a power of two, so that few compile."""
    if self._rows is not None:
      masks = masks[:, self._rows]
    num_blocks, block = self._mesh.size * self._num_blocks, self._block
    groups = next_power_of_two(len(masks))
    masks = np.pad(masks, ((0, groups - len(masks)), (0, num_blocks * block - self.num_labels)))
    masks = masks.reshape(groups, num_blocks, block).swapaxes(0, 1)
    sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    return jax.make_array_from_callback(masks.shape, sharding, lambda index: masks[index])

  def _put(self, chunk: np.ndarray, width: int) -> jax.Array:
    """Copies a chunk of queries to all devices, padded so that all chunks run the same program."""
    chunk = np.pad(chunk, [(0, width - len(chunk)), *[(0, 0)] * (chunk.ndim - 1)])
    return jax.make_array_from_callback(chunk.shape, self._replicated, lambda index: chunk[index])


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


@functools.lru_cache(maxsize=64)
def _compiled_search(mesh: Mesh, num_labels: int, k: int, masked: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Returns the jitted search; it is cached, so that the index of the next evaluation compiles nothing."""
  axes = mesh.axis_names
  search = functools.partial(_search_shard, axes=axes, num_labels=num_labels, k=k)
  # The results are equal on all devices after the final all_gather, which JAX cannot infer.
  in_specs = (PartitionSpec(axes), PartitionSpec())
  return jax.jit(
    jax.shard_map(
      search, mesh=mesh, check_vma=False, in_specs=2 * in_specs if masked else in_specs, out_specs=PartitionSpec()
    )
  )


def _search_shard(
  labels: jax.Array,
  queries: jax.Array,
  masks: jax.Array | None = None,
  mask_of_query: jax.Array | None = None,
  *,
  axes: tuple[str, ...],
  num_labels: int,
  k: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the top k of all devices' labels, of which this device holds [blocks, block, D]."""
  num_blocks, block, _ = labels.shape
  first = jax.lax.axis_index(axes) * num_blocks * block

  def step(
    best: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array, jax.Array | None]
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    number, block_labels, block_masks = inputs
    scores = jnp.einsum("qd,ld->ql", queries, block_labels.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    start = first + number * block
    scores = jnp.where(start + jnp.arange(block) < num_labels, scores, -jnp.inf)
    if block_masks is not None:
      scores = jnp.where(block_masks[mask_of_query], scores, -jnp.inf)
    values, positions = block_top_k(scores, min(k, block))
    return _merge(best, (values, start + positions), k), None

  nothing = (jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32))
  best, _ = jax.lax.scan(step, nothing, (jnp.arange(num_blocks), labels, masks))
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
