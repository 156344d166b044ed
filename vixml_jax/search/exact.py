"""Exact maximum inner product search on device, with the labels sharded over all devices."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.errors import InputError


class ExactIndex:
  """Label embeddings spread over the devices of a mesh, scored in full.

  Every device keeps an equal, contiguous range of the labels. A chunk of
  queries goes to all devices; each scores its labels block after block with a
  running top k, and the devices' top k are merged. Device memory beside the
  labels is one `[query_chunk, block]` array of scores.

  Attributes:
    num_labels: L.
  """

  def __init__(
    self,
    embeddings: np.ndarray | jax.Array,
    mesh: Mesh | None = None,
    *,
    block: int = 65_536,
    query_chunk: int = 512,
  ):
    """Places the labels on the devices.

    Args:
      embeddings: [L, D], float32 or bfloat16 (kept as it is; half the memory).
        A NumPy array, memory-mapped or not, or a JAX array of any sharding.
        With several processes, NumPy arrays must be the same in all of them.
      mesh: the devices; None takes all of them.
      block: the most labels that a device scores at once.
      query_chunk: how many queries are scored at once.

    Raises:
      InputError: if there is no label, or embeddings are not two-dimensional.
    """
    if embeddings.ndim != 2 or len(embeddings) == 0:
      raise InputError(
        f"label embeddings have shape {embeddings.shape}: search needs [L, D] with L at least 1"
      )
    self.num_labels, self._dim = embeddings.shape
    self._mesh = Mesh(np.asarray(jax.devices()), ("data",)) if mesh is None else mesh
    self._query_chunk = query_chunk
    per_device = math.ceil(self.num_labels / self._mesh.size)
    self._num_blocks = math.ceil(per_device / block)
    # Equal blocks, so that at most `_num_blocks` rows a device are padding.
    self._block = math.ceil(per_device / self._num_blocks)
    self._labels = self._place(embeddings)

  def search(self, queries: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k labels of highest inner product, the lower id first where scores are equal.

    Scores are float32 at full precision. Each k compiles once.

    Args:
      queries: [Q, D]; with several processes, the same in all of them.
      k: how many labels, at least 1.

    Returns:
      scores float32 [Q, K] in descending order and ids int32 [Q, K], on the
      host of every process; where k exceeds L the rest has score -inf, id -1.
    """
    if k < 1:
      raise ValueError(f"k is {k}, must be at least 1")
    if queries.ndim != 2 or queries.shape[1] != self._dim:
      raise InputError(
        f"queries have shape {queries.shape} but label embeddings have {self._dim} columns"
      )
    queries = _to_host(queries, self._replicated)
    program = _program(self._mesh, self.num_labels, k)
    scores = np.empty((len(queries), k), np.float32)
    ids = np.empty((len(queries), k), np.int32)
    pending = None
    for start in range(0, len(queries), self._query_chunk):
      result = program(self._labels, self._put(queries[start : start + self._query_chunk]))
      if pending:
        _fetch(*pending, scores, ids)
      pending = (start, result)  # fetched while the devices work on the next chunk
    if pending:
      _fetch(*pending, scores, ids)
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
      rows = np.asarray(embeddings[first * block : last * block])
      rows = np.pad(rows, ((0, (last - first) * block - len(rows)), (0, 0)))
      return rows.reshape(last - first, block, self._dim)

    return jax.make_array_from_callback(shape, sharding, shard)

  def _put(self, chunk: np.ndarray) -> jax.Array:
    """One chunk of queries on all devices, padded so that all chunks share one program."""
    chunk = np.pad(chunk.astype(np.float32), ((0, self._query_chunk - len(chunk)), (0, 0)))
    return jax.make_array_from_callback(chunk.shape, self._replicated, lambda index: chunk[index])


def block_top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Exact `jax.lax.top_k` along wide rows, in a fraction of its time.

  `top_k` sorts whole rows on GPU and TPU and scans them with a heap on CPU.
  Here the row is cut into groups of about sqrt(W / k) neighbours, and only the
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
def _program(mesh: Mesh, num_labels: int, k: int):
  """The jitted search; kept, so that the index of the next evaluation compiles nothing."""
  axes = mesh.axis_names
  search = functools.partial(_search_shard, axes=axes, num_labels=num_labels, k=k)
  # Results are the same on all devices after the gather at the end, which JAX cannot infer.
  return jax.jit(jax.shard_map(
    search, mesh=mesh, check_vma=False, in_specs=(PartitionSpec(axes), PartitionSpec()),
    out_specs=PartitionSpec(),
  ))


def _search_shard(labels, queries, *, axes, num_labels: int, k: int):
  """Top k of one device's labels [blocks, block, D], merged with those of all other devices."""
  num_blocks, block, _ = labels.shape
  first = jax.lax.axis_index(axes) * num_blocks * block

  def step(best, inputs):
    number, block_labels = inputs
    scores = jnp.einsum(
      "qd,ld->ql", queries, block_labels.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    start = first + number * block
    scores = jnp.where(start + jnp.arange(block) < num_labels, scores, -jnp.inf)
    values, positions = block_top_k(scores, min(k, block))
    return _merge(best, (values, start + positions), k), None

  nothing = (jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32))
  best, _ = jax.lax.scan(step, nothing, (jnp.arange(num_blocks), labels))
  scores, ids = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in best)
  values, ids = _top_of(scores, ids, k)
  return values, jnp.where(values == -jnp.inf, -1, ids)


def _merge(left, right, k: int):
  """Top k of two lists of (values, ids); the left one holds the lower ids and wins ties."""
  return _top_of(
    jnp.concatenate([left[0], right[0]], axis=1), jnp.concatenate([left[1], right[1]], axis=1), k
  )


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
