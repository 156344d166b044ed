"""Label centroids, the mean embedding of each label's training queries, summed on device.

The host streams pairs of a query and a label in blocks of fixed size, one range of labels after another. Each device
sums the queries that it holds, and the sums are sent to the device that stores the label. Before they are added,
embeddings are rounded to integers, in a unit as fine as the label's number of queries allows. Sums are therefore the
same in any order: neither atomic additions nor the number of devices change the result.
"""

from collections.abc import Callable, Iterator
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax import sharding
from vixml_jax.mining.rows import mesh_of, shard_rows
from vixml_jax.ragged import Ragged
from vixml_jax.sharding import to_global
from vixml_jax.stages import LONG, stage

PAIR_BLOCK = 16384
"""Number of pairs that a device gathers at a time; their temporaries need `8 * PAIR_BLOCK * D` bytes."""
LABEL_BLOCK = 32768
"""Number of labels that are summed at a time; their sums need `4 * LABEL_BLOCK * D` bytes."""


def label_centroids(
  embeddings: jax.Array | np.ndarray,
  labels_of_queries: Ragged,
  num_labels: int,
  *,
  mesh: Mesh | None = None,
  dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
  """Returns the mean embedding of each label's training queries (PRIME, arXiv 2410.20401).

  Args:
    embeddings: [N, D], on the devices, split by rows, or on the host; rows after those of the queries are ignored.
    labels_of_queries: Label ids of each query, N rows.
    num_labels: Number of labels L; labels without queries may follow the largest id.
    mesh: Devices to share the work among. The default is the mesh of `embeddings` if they are sharded, else one device.
    dtype: Type of the result.

  Returns:
    [L rounded up by `sharding.padded_rows`, D], split by rows over the mesh; zeros for a label without queries and for
    padding.
  """
  return mean_of_rows(embeddings, labels_of_queries.transpose(num_labels), mesh=mesh, dtype=dtype)


def cluster_means(
  embeddings: jax.Array | np.ndarray,
  clusters: np.ndarray,
  num_clusters: int,
  *,
  normalized: bool = False,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Returns the mean embedding of the labels in each cluster, float32 [C, D]; zeros for a cluster without labels.

  Args:
    embeddings: Embeddings of the labels, [L, D] or with padding.
    clusters: int32 [L], the cluster (free vector) of each label.
    num_clusters: Number of clusters C.
    normalized: Whether to scale each embedding to unit norm.
    mesh: Devices to share the work among, as for `label_centroids`.
  """
  cluster_of = Ragged.of_lengths(clusters, np.ones(len(clusters), np.int64))
  return mean_of_rows(
    embeddings, cluster_of.transpose(num_clusters), mesh=mesh, normalized=normalized, num_rows=num_clusters
  )


def mean_of_rows(
  embeddings: jax.Array | np.ndarray,
  members: Ragged,
  *,
  mesh: Mesh | None = None,
  dtype: jnp.dtype = jnp.float32,
  normalized: bool = False,
  num_rows: int | None = None,
) -> jax.Array:
  """Returns the mean of the embeddings that each row of `members` lists: `label_centroids` of the transposed pairs.

  No device holds more than its share of the embeddings and of the means, and one block of labels.

  Args:
    embeddings: [N, D], as for `label_centroids`.
    members: Query ids of each label, L rows.
    mesh: Devices to share the work among, as for `label_centroids`.
    dtype: Type of the result.
    normalized: Whether to scale each embedding to unit norm.
    num_rows: Number of rows of the result, at least L; the default is L rounded up by `sharding.padded_rows`.

  Returns:
    [num_rows, D], split by rows over the mesh; zeros for a label without queries and for padding.
  """
  mesh = mesh or mesh_of(embeddings)
  embeddings = shard_rows(embeddings, mesh)
  num_rows = sharding.padded_rows(len(members)) if num_rows is None else num_rows
  plan = _Plan(len(members), num_rows, len(embeddings), mesh.size)
  max_exponent = 0 if normalized else _ceil_log2(np.asarray(_max_magnitude(embeddings)).item())
  by_row = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  replicated = NamedSharding(mesh, PartitionSpec())
  dim = embeddings.shape[1]
  means = _zeros((mesh.size * plan.labels_per_device, dim), jnp.dtype(dtype), by_row)
  sums = _zeros((mesh.size, mesh.size * plan.width, dim), jnp.dtype(jnp.int32), by_row)
  starts = plan.starts()
  with stage(
    f"compute the means of {len(members):,} labels or clusters",
    total=len(starts),
    unit="block",
    logged=len(members.values) >= LONG,
  ) as progress:
    for start in starts:
      counts = plan.counts(members, start)
      exponent = 30 - max_exponent - np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int32)
      unit = to_global(np.ldexp(np.float32(1), exponent), replicated)
      for rows, slots in plan.pairs(members, start):
        sums = _add(
          sums, embeddings, to_global(rows, by_row), to_global(slots, by_row), unit, mesh=mesh, normalized=normalized
        )
      sums.block_until_ready()  # XLA ends a run on CPUs if one device waits for another for more than 40 seconds.
      means, sums = _finish(means, sums, to_global(counts, replicated), unit, np.int32(start), mesh=mesh)
      progress.advance()
    means.block_until_ready()
  where = sharding.named_sharding(mesh, "label", "vector")
  if len(means) == num_rows:
    return jax.device_put(means, where)
  return jax.jit(lambda x: x[:num_rows], out_shardings=where)(means)  # Fewer rows than devices, or nearly.


def mean_programs(
  embeddings: jax.ShapeDtypeStruct, num_labels: int, num_rows: int, mesh: Mesh, normalized: bool = False
) -> dict[str, Callable[[], jax.stages.Lowered]]:
  """Returns functions that lower the programs of `mean_of_rows` of float32, by name, for ahead-of-time compilation.

  Args:
    embeddings: Shape and type of the embeddings, with their padding.
    num_labels: Number of labels L.
    num_rows: Number of rows of the result.
    mesh: Devices, which need not exist.
    normalized: As for `mean_of_rows`.
  """
  plan = _Plan(num_labels, num_rows, embeddings.shape[0], mesh.size)
  by_row, replicated = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())
  dim, slots = embeddings.shape[1], mesh.size * plan.width

  def struct(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  rows = struct(embeddings.shape, embeddings.dtype, by_row)
  means = struct((mesh.size * plan.labels_per_device, dim), jnp.float32, by_row)
  sums = struct((mesh.size, slots, dim), jnp.int32, by_row)
  pairs = struct((mesh.size, PAIR_BLOCK), jnp.int32, by_row)
  unit, counts = struct((slots,), jnp.float32, replicated), struct((slots,), jnp.int32, replicated)
  start = jax.ShapeDtypeStruct((), jnp.int32)
  return {
    "largest value": lambda: _max_magnitude.lower(rows),
    "sums": lambda: _add.lower(sums, rows, pairs, pairs, unit, mesh=mesh, normalized=normalized),
    "means": lambda: _finish.lower(means, sums, counts, unit, start, mesh=mesh),
  }


class _Plan:
  """Blocks of labels and the pairs of each.

  Device p stores the labels from `p * labels_per_device` on. A block has a slot for each of `width` labels of every
  device, the same range on each, so that every device finishes labels of its own.
  """

  def __init__(self, num_labels: int, padded_labels: int, num_rows: int, num_devices: int):
    self.num_labels = num_labels
    self.num_devices = num_devices
    self.rows_per_device = num_rows // num_devices
    self.labels_per_device = -(-padded_labels // num_devices)
    most = max(1, LABEL_BLOCK // num_devices)
    blocks = -(-self.labels_per_device // most)
    self.width = -(-self.labels_per_device // blocks)

  def starts(self) -> list[int]:
    """Returns the first label of every block; the last block overlaps the one before so as to have full width."""
    last = self.labels_per_device - self.width
    return [min(start, last) for start in range(0, self.labels_per_device, self.width)]

  def labels(self, start: int) -> np.ndarray:
    """Returns the label of each slot of a block; L for a slot without a label."""
    first = np.arange(self.num_devices)[:, None] * self.labels_per_device + start
    return np.minimum(first + np.arange(self.width), self.num_labels).reshape(-1)

  def counts(self, members: Ragged, start: int) -> np.ndarray:
    """Returns int32, the number of rows that are summed in each slot of a block."""
    labels = self.labels(start)
    ends = np.minimum(labels + 1, self.num_labels)
    return (members.offsets[ends] - members.offsets[labels]).astype(np.int32)

  def pairs(self, members: Ragged, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of each device and their slots, int32 [devices, PAIR_BLOCK] each."""
    labels = self.labels(start).reshape(self.num_devices, self.width)
    rows = np.concatenate(
      [
        members.values[members.offsets[first] : members.offsets[min(last + 1, self.num_labels)]]
        for first, last in labels[:, [0, -1]]
      ]
    )
    slots = np.repeat(np.arange(labels.size, dtype=np.int32), self.counts(members, start))
    owners = rows // self.rows_per_device
    order = np.argsort(owners, kind="stable")
    owned = np.bincount(owners, minlength=self.num_devices)
    first = np.cumsum(owned) - owned
    for done in range(0, owned.max(initial=0), PAIR_BLOCK):
      block_rows = np.zeros((self.num_devices, PAIR_BLOCK), np.int32)
      block_slots = np.full((self.num_devices, PAIR_BLOCK), labels.size, np.int32)
      for device in range(self.num_devices):
        count = max(0, min(PAIR_BLOCK, owned[device] - done))
        chosen = order[first[device] + done : first[device] + done + count]
        block_rows[device, :count] = rows[chosen] - device * self.rows_per_device
        block_slots[device, :count] = slots[chosen]
      yield block_rows, block_slots


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
  return lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@jax.jit
def _max_magnitude(embeddings: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(embeddings), initial=0).astype(jnp.float32)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("mesh", "normalized"))
def _add(
  sums: jax.Array,
  embeddings: jax.Array,
  rows: jax.Array,
  slots: jax.Array,
  unit: jax.Array,
  *,
  mesh: Mesh,
  normalized: bool,
) -> jax.Array:
  """Adds a block of pairs to the sums, in multiples of `1 / unit` of the label."""

  def add(sums: jax.Array, share: jax.Array, rows: jax.Array, slots: jax.Array, unit: jax.Array) -> jax.Array:
    values = share[rows[0]].astype(jnp.float32)
    if normalized:
      norms = jnp.linalg.norm(values, axis=1, keepdims=True)
      values = values / jnp.where(norms > 0, norms, 1)
    scaled = values * unit[jnp.minimum(slots[0], len(unit) - 1)][:, None]
    summand = jnp.round(scaled).astype(jnp.int32)
    return sums[0].at[slots[0]].add(summand, mode="drop", indices_are_sorted=True)[None]

  split = PartitionSpec(mesh.axis_names)
  return jax.shard_map(add, mesh=mesh, in_specs=(split, split, split, split, PartitionSpec()), out_specs=split)(
    sums, embeddings, rows, slots, unit
  )


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="mesh")
def _finish(
  means: jax.Array, sums: jax.Array, counts: jax.Array, unit: jax.Array, start: jax.typing.ArrayLike, *, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """Writes the means of a block and resets its sums to zero."""

  def finish(
    means: jax.Array, sums: jax.Array, factor: jax.Array, start: jax.typing.ArrayLike
  ) -> tuple[jax.Array, jax.Array]:
    total = lax.psum_scatter(sums[0], mesh.axis_names, tiled=True).astype(jnp.float32)
    done = lax.dynamic_update_slice_in_dim(means, (total * factor[:, None]).astype(means.dtype), start, 0)
    return done, jnp.zeros_like(sums)

  split = PartitionSpec(mesh.axis_names)
  factor = 1 / (unit * jnp.maximum(counts, 1))
  return jax.shard_map(finish, mesh=mesh, in_specs=(split, split, split, PartitionSpec()), out_specs=split)(
    means, sums, factor, start
  )


def _ceil_log2(value: float) -> int:
  return math.ceil(math.log2(value)) if value > 0 else 0
