"""Label centroids: the mean embedding of each label's training queries, added up on device.

The host streams (query, label) pairs in fixed-size blocks, one range of labels after another; each
device adds up the queries that it holds and the sums are handed to the device that keeps the label.
Summands are rounded to integers as fine as the label's number of queries allows, so that sums come out
the same in any order: atomics and the number of devices make no difference.
"""

from collections.abc import Iterator
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
from tqdm import tqdm

from vixml_jax.mining.rows import mesh_of, shard_rows
from vixml_jax.ragged import Ragged
from vixml_jax.sharding import to_global

# Pairs that a device gathers at a time and labels whose sums are open at a time: they bound the
# temporaries, `8 * PAIR_BLOCK * D` and `4 * LABEL_BLOCK * D` bytes.
PAIR_BLOCK = 16384
LABEL_BLOCK = 32768


def label_centroids(
  embeddings: jax.Array | np.ndarray,
  labels_of_queries: Ragged,
  num_labels: int,
  *,
  mesh: Mesh | None = None,
  dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
  """Mean of the embeddings of each label's training queries (PRIME, arXiv 2410.20401).

  Args:
    embeddings: [N, D], sharded over rows or not; may have more rows than there are queries.
    labels_of_queries: N rows of label ids.
    num_labels: L. May be larger than the largest label: the rest is zero.
    mesh: devices to share the work among; by default that of `embeddings`, else one device.
    dtype: of the result.

  Returns:
    [L, D], zero for a label without queries. Sharded over the labels on all axes of the mesh
    where its devices divide L, else replicated.
  """
  return mean_of_rows(embeddings, labels_of_queries.transpose(num_labels), mesh=mesh, dtype=dtype)


def mean_of_rows(
  embeddings: jax.Array | np.ndarray, members: Ragged, *, mesh: Mesh | None = None, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
  """Mean of the embeddings that each row of `members` lists: `label_centroids`, transposed already.

  Args:
    embeddings: [N, D], sharded over rows or not.
    members: L rows of query ids.
    mesh: as for `label_centroids`.
    dtype: of the result.

  Returns:
    [L, D] as from `label_centroids`.
  """
  mesh = mesh or mesh_of(embeddings)
  embeddings = shard_rows(embeddings, mesh)
  layout = _Layout(len(members), len(embeddings), mesh.size)
  limit = _ceil_log2(np.asarray(_largest(embeddings)).item())
  by_row = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  replicated = NamedSharding(mesh, PartitionSpec())
  dim = embeddings.shape[1]
  means = _zeros((mesh.size * layout.labels_per_device, dim), jnp.dtype(dtype), by_row)
  sums = _zeros((mesh.size, mesh.size * layout.width, dim), jnp.dtype(jnp.int32), by_row)
  for start in tqdm(layout.starts(), desc="centroids", unit="block", disable=None, leave=False):
    counts = layout.counts(members, start)
    exponent = 30 - limit - np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int32)
    unit = to_global(np.ldexp(np.float32(1), exponent), replicated)
    for rows, slots in layout.pairs(members, start):
      sums = _add(sums, embeddings, to_global(rows, by_row), to_global(slots, by_row), unit, mesh=mesh)
    means, sums = _finish(means, sums, to_global(counts, replicated), unit, np.int32(start), mesh=mesh)
  if len(means) == len(members):
    return means
  return jax.jit(lambda x: x[: len(members)], out_shardings=replicated)(means)


class _Layout:
  """Which labels are open at a time, and where their pairs go.

  Device p keeps the labels from `p * labels_per_device` on. A block is the same range of labels of every
  device: `width` from `start` on, so that each device closes labels of its own.
  """

  def __init__(self, num_labels: int, num_rows: int, num_devices: int):
    self.num_labels = num_labels
    self.num_devices = num_devices
    self.rows_per_device = num_rows // num_devices
    self.labels_per_device = -(-num_labels // num_devices)
    most = max(1, LABEL_BLOCK // num_devices)
    blocks = -(-self.labels_per_device // most)
    self.width = -(-self.labels_per_device // blocks)

  def starts(self) -> list[int]:
    """First label of every block; the last block reaches back so as to be whole."""
    last = self.labels_per_device - self.width
    return [min(start, last) for start in range(0, self.labels_per_device, self.width)]

  def labels(self, start: int) -> np.ndarray:
    """Labels of a block in the order of their slots; L where there is none."""
    first = np.arange(self.num_devices)[:, None] * self.labels_per_device + start
    return np.minimum(first + np.arange(self.width), self.num_labels).reshape(-1)

  def counts(self, members: Ragged, start: int) -> np.ndarray:
    """int32, how many rows each slot of a block adds up."""
    labels = self.labels(start)
    ends = np.minimum(labels + 1, self.num_labels)
    return (members.offsets[ends] - members.offsets[labels]).astype(np.int32)

  def pairs(self, members: Ragged, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of each device and the slots that they go to, int32 [devices, PAIR_BLOCK] each."""
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
    held = np.bincount(owners, minlength=self.num_devices)
    first = np.cumsum(held) - held
    for done in range(0, held.max(initial=0), PAIR_BLOCK):
      block_rows = np.zeros((self.num_devices, PAIR_BLOCK), np.int32)
      block_slots = np.full((self.num_devices, PAIR_BLOCK), labels.size, np.int32)
      for device in range(self.num_devices):
        count = max(0, min(PAIR_BLOCK, held[device] - done))
        chosen = order[first[device] + done : first[device] + done + count]
        block_rows[device, :count] = rows[chosen] - device * self.rows_per_device
        block_slots[device, :count] = slots[chosen]
      yield block_rows, block_slots


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype, sharding: NamedSharding) -> jax.Array:
  return lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@jax.jit
def _largest(embeddings) -> jax.Array:
  return jnp.max(jnp.abs(embeddings), initial=0).astype(jnp.float32)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def _add(sums, embeddings, rows, slots, unit, *, mesh: Mesh) -> jax.Array:
  """Adds a block of pairs to the sums, in multiples of `1 / unit` of the label."""

  def add(sums, share, rows, slots, unit):
    scaled = share[rows[0]].astype(jnp.float32) * unit[jnp.minimum(slots[0], len(unit) - 1)][:, None]
    summand = jnp.round(scaled).astype(jnp.int32)
    return sums[0].at[slots[0]].add(summand, mode="drop", indices_are_sorted=True)[None]

  split = PartitionSpec(mesh.axis_names)
  return jax.shard_map(add, mesh=mesh, in_specs=(split, split, split, split, PartitionSpec()), out_specs=split)(
    sums, embeddings, rows, slots, unit
  )


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="mesh")
def _finish(means, sums, counts, unit, start, *, mesh: Mesh):
  """Writes the means of a block and clears its sums."""

  def finish(means, sums, factor, start):
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
