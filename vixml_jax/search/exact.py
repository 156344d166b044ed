"""Exact maximum inner product search on device, with the labels sharded over all devices."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.rounding import next_power_of_two

_LEAST_QUERIES = 8  # Fewer cost the same time.


class ExactIndex:
  """Label embeddings spread over the devices of a mesh, scored in full.

  Every device keeps an equal, contiguous range of the labels. A chunk of
  queries goes to all devices; each scores its labels block after block with a
  running top k, and the devices' top k are merged. Device memory beside the
  labels is one `[query_chunk, block]` array of scores.

  Attributes:
    num_labels: how many labels are searched.
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
      embeddings: [L, D], float32 or bfloat16 (kept as it is; half the memory).
        A NumPy array, memory-mapped or not, or a JAX array of any sharding.
        With several processes, NumPy arrays must be the same in all of them.
      mesh: the devices; None takes all of them.
      rows: ascending ids of the labels to search, of embeddings that are a NumPy array; None
        takes all of them. Only these are read and placed; what is found are still ids of labels.
      block: the most labels that a device scores at once.
      query_chunk: how many queries are scored at once.

    Raises:
      InputError: if there is no label, or embeddings are not two-dimensional.
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
    # Equal blocks, so that at most `_num_blocks` rows a device are padding.
    self._block = math.ceil(per_device / self._num_blocks)
    self._labels = self._place(embeddings)

  def search(
    self, queries: np.ndarray | jax.Array, k: int, masks: np.ndarray | None = None, mask_of: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """The k labels of highest inner product, the lower id first where scores are equal.

    Scores are float32 at full precision. Each k compiles once, and once more for each power of two
    of queries below `query_chunk`: a single query need not wait for the scores of a full chunk.

    Args:
      queries: [Q, D]; with several processes, the same in all of them.
      k: how many labels, at least 1.
      masks: bool [G, L], the labels that queries may have, by id; None for all labels.
        Every label is scored and what is masked gets -inf. G is small: the masks stand on the devices.
      mask_of: the mask of each query, int [Q].

    Returns:
      scores float32 [Q, K] in descending order and ids int32 [Q, K], on the
      host of every process; where fewer than k labels are left the rest has score -inf, id -1.
    """
    if k < 1:
      raise ValueError(f"k is {k}, must be at least 1")
    if queries.ndim != 2 or queries.shape[1] != self._dim:
      raise InputError(f"queries have shape {queries.shape} but label embeddings have {self._dim} columns")
    queries = _to_host(queries, self._replicated).astype(np.float32)
    program = _program(self._mesh, self.num_labels, k, masks is not None)
    placed = () if masks is None else (self._place_masks(masks),)
    scores = np.empty((len(queries), k), np.float32)
    ids = np.empty((len(queries), k), np.int32)
    width = min(self._query_chunk, max(_LEAST_QUERIES, next_power_of_two(len(queries))))
    pending = None
    for start in range(0, len(queries), width):
      part = slice(start, start + width)
      chosen = () if mask_of is None else (self._put(mask_of[part].astype(np.int32), width),)
      result = program(self._labels, self._put(queries[part], width), *placed, *chosen)
      if pending:
        _fetch(*pending, scores, ids)
      pending = (start, result)  # fetched while the devices work on the next chunk
    if pending:
      _fetch(*pending, scores, ids)
    if self._rows is not None:
      ids = np.where(ids < 0, -1, self._rows[ids]).astype(np.int32)
    return scores, ids

  @property
  def _replicated(self) -> NamedSharding:
    return NamedSharding(self._mesh, PartitionSpec())

  def _place(self, embeddings) -> jax.Array:
    """[L, D] -> [devices * blocks, block, D], padded with zeros, sharded along the first axis."""
    sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    num_blocks, block = self._mesh.size * self._num_blocks, self._block
    padding = num_blocks * block - self.num_labels
    shape = (num_blocks, block, self._dim)
    if isinstance(embeddings, jax.Array):
      pad = lambda x: jnp.pad(x, ((0, padding), (0, 0))).reshape(shape)
      return jax.jit(pad, out_shardings=sharding)(embeddings)

    def shard(index):
      first, last, _ = index[0].indices(num_blocks)
      own = slice(first * block, last * block)
      rows = np.asarray(embeddings[own if self._rows is None else self._rows[own]])
      rows = np.pad(rows, ((0, (last - first) * block - len(rows)), (0, 0)))
      return rows.reshape(last - first, block, self._dim)

    return jax.make_array_from_callback(shape, sharding, shard)

  def _place_masks(self, masks: np.ndarray) -> jax.Array:
    """[G, L] -> [devices * blocks, G', block] beside the labels; G' is a power of two, so that few are compiled."""
    if self._rows is not None:
      masks = masks[:, self._rows]
    num_blocks, block = self._mesh.size * self._num_blocks, self._block
    groups = next_power_of_two(len(masks))
    masks = np.pad(masks, ((0, groups - len(masks)), (0, num_blocks * block - self.num_labels)))
    masks = masks.reshape(groups, num_blocks, block).swapaxes(0, 1)
    sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    return jax.make_array_from_callback(masks.shape, sharding, lambda index: masks[index])

  def _put(self, chunk: np.ndarray, width: int) -> jax.Array:
    """One chunk of queries on all devices, padded so that all chunks share one program."""
    chunk = np.pad(chunk, [(0, width - len(chunk)), *[(0, 0)] * (chunk.ndim - 1)])
    return jax.make_array_from_callback(chunk.shape, self._replicated, lambda index: chunk[index])


def block_top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Exact `jax.lax.top_k` along wide rows, in a fraction of its time.

  `top_k` sorts whole rows on GPU and TPU and scans them with a heap on CPU.
  Here the row is cut into groups of about sqrt(W / k) neighbors, and only the
  k groups of highest maximum are looked into, W / group + k * group values in
  all. The top k lie in these groups: if x does not, k groups stand before x's
  own group; each holds a value greater than x, or equal to x and at a lower
  position; so k values stand before x.

  Args:
    scores: [Q, W].
    k: at most W.

  Returns:
    values [Q, k] in descending order and positions int32 [Q, k]; of equal
    values the one at the lower position first.
  """
  rows, width = scores.shape
  group = 2 ** round(math.log2(max(width / k, 1)) / 2)
  if group < 4:
    return jax.lax.top_k(scores, k)
  scores = jnp.pad(scores, ((0, 0), (0, -width % group)), constant_values=-jnp.inf)
  grouped = scores.reshape(rows, -1, group)
  _, groups = jax.lax.top_k(grouped.max(-1), k)
  groups = jnp.sort(groups, axis=-1)  # so that candidates stand in the order of their positions
  candidates = jnp.take_along_axis(grouped, groups[..., None], axis=1).reshape(rows, k * group)
  values, places = jax.lax.top_k(candidates, k)
  positions = jnp.take_along_axis(groups, places // group, axis=1) * group + places % group
  return values, positions


@functools.lru_cache(maxsize=64)
def _program(mesh: Mesh, num_labels: int, k: int, masked: bool):
  """The jitted search; kept, so that the index of the next evaluation compiles nothing."""
  axes = mesh.axis_names
  search = functools.partial(_search_shard, axes=axes, num_labels=num_labels, k=k)
  # Results are the same on all devices after the gather at the end, which JAX cannot infer.
  in_specs = (PartitionSpec(axes), PartitionSpec())
  return jax.jit(
    jax.shard_map(
      search, mesh=mesh, check_vma=False, in_specs=2 * in_specs if masked else in_specs, out_specs=PartitionSpec()
    )
  )


def _search_shard(labels, queries, masks=None, mask_of=None, *, axes, num_labels: int, k: int):
  """Top k of one device's labels [blocks, block, D], merged with those of all other devices."""
  num_blocks, block, _ = labels.shape
  first = jax.lax.axis_index(axes) * num_blocks * block

  def step(best, inputs):
    number, block_labels, block_masks = inputs
    scores = jnp.einsum("qd,ld->ql", queries, block_labels.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    start = first + number * block
    scores = jnp.where(start + jnp.arange(block) < num_labels, scores, -jnp.inf)
    if block_masks is not None:
      scores = jnp.where(block_masks[mask_of], scores, -jnp.inf)
    values, positions = block_top_k(scores, min(k, block))
    return _merge(best, (values, start + positions), k), None

  nothing = (jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32))
  best, _ = jax.lax.scan(step, nothing, (jnp.arange(num_blocks), labels, masks))
  scores, ids = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in best)
  values, ids = _top_of(scores, ids, k)
  return values, jnp.where(values == -jnp.inf, -1, ids)


def _merge(left, right, k: int):
  """Top k of two lists of (values, ids); the left one holds the lower ids and wins ties."""
  return _top_of(jnp.concatenate([left[0], right[0]], axis=1), jnp.concatenate([left[1], right[1]], axis=1), k)


def _top_of(values, ids, k: int):
  values, places = jax.lax.top_k(values, k)
  return values, jnp.take_along_axis(ids, places, axis=1)


def _to_host(queries, replicated: NamedSharding) -> np.ndarray:
  if isinstance(queries, jax.Array) and not queries.is_fully_addressable:
    queries = jax.jit(lambda x: x, out_shardings=replicated)(queries)
  return np.asarray(queries)


def _fetch(start: int, result, scores: np.ndarray, ids: np.ndarray) -> None:
  stop = min(start + len(result[0]), len(scores))
  scores[start:stop] = np.asarray(result[0])[: stop - start]
  ids[start:stop] = np.asarray(result[1])[: stop - start]
