"""Encodes any number of items with a trained model: packed, chunk by chunk, over the whole mesh.

`embed_rows`, `pool_rows` and `prototype_rows` are for whole splits of a data set: their results stay on the devices,
split by rows. `embed`, `pooled` and `prototypes` return the vectors of a few items on the host, for inference.
"""

from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from vixml_jax import sharded_rows, sharding
from vixml_jax.encoding.inputs import EncoderInputs, chunk_on_mesh, image_tokens
from vixml_jax.images.features import ImageFeatures
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedItems, PackedLayout, pack
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.dual_encoder import l2_normalize
from vixml_jax.models.parameters import join_params, restack_layers
from vixml_jax.rounding import largest_divisor
from vixml_jax.sharded_rows import ShardedRows
from vixml_jax.stages import LONG, stage
from vixml_jax.typing import Array, Tree

# Items packed at a time: enough for best-fit to find partners for long items, few enough to hold in memory.
_BLOCK = 16384
# Chunks in flight: the host packs and copies the next ones while the devices compute.
_IN_FLIGHT = 2
_MIN_NORM = 1e-12
_CPU_TOKENS = 1024  # Their activations stay in a core's caches. MiniLM encodes 1.6 times as fast as 6,656 at a time.


@dataclasses.dataclass(frozen=True)
class ItemEncoder:
  """Embeds queries and labels without dropout.

  Attributes:
    model: Definition of the model.
    layout: Shape of packed rows.
    mesh: Devices; rows are sharded over them.
    features: Image features of the data set; None for a model of texts only.
    frozen: Parameters that are not trained. The methods take the trained ones.
  """

  model: ModelDefinition
  layout: PackedLayout
  mesh: Mesh
  features: ImageFeatures | None = None
  frozen: Tree = dataclasses.field(default_factory=dict, repr=False)

  def _pool(self, params: Tree, frozen: Tree, inputs: EncoderInputs, features: Array | None) -> Array:
    """Returns the pooled outputs [R, S, D] of one chunk."""
    images = image_tokens(inputs.images, features)
    model = self.model.bind(restack_layers(join_params(params, frozen)))
    with sharding.use_mesh(self.mesh):
      return model.pool(inputs.tokens, inputs.segments, inputs.positions, self.layout.slots, images)

  @functools.cached_property
  def pool_program(self) -> jax.stages.Wrapped:
    """The jitted `(params, frozen, inputs, features) -> pooled outputs [R, S, D]` of one chunk."""
    return jax.jit(self._pool, out_shardings=sharding.named_sharding(self.mesh))

  @functools.cached_property
  def store_program(self) -> jax.stages.Wrapped:
    """The jitted `(rows, params, frozen, inputs, features, ids, normalized) -> (rows, count)` of one chunk.

    It writes the pooled outputs of the chunk's items into `rows`, [items, D], at `ids`, int32 [R * S]; -1 marks an
    empty slot. `normalized` scales them to unit norm. `rows` is donated. `count` is the number of items, which is ready
    as soon as the chunk has been encoded.
    """

    def store_chunk(
      rows: Array,
      params: Tree,
      frozen: Tree,
      inputs: EncoderInputs,
      features: Array | None,
      ids: Array,
      normalized: bool,
    ) -> tuple[Array, Array]:
      pooled = self._pool(params, frozen, inputs, features).reshape(len(ids), -1)
      pooled = l2_normalize(pooled) if normalized else pooled
      return sharded_rows.put_rows(rows, ids, pooled, self.mesh), jnp.sum(ids >= 0)

    out = (sharding.named_sharding(self.mesh, "query", "vector"), sharding.named_sharding(self.mesh))
    return jax.jit(store_chunk, donate_argnums=0, static_argnames="normalized", out_shardings=out)

  @functools.cached_property
  def prototype_rows_program(self) -> jax.stages.Wrapped:
    """The jitted `(rows, params, frozen, clusters, centroids, start) -> rows` of one block of labels.

    It replaces pooled outputs by prototypes: on every device, those of `prototype_block` labels from its label `start`
    on. No row leaves its device. `rows` is donated.
    """

    def prototype_block(
      rows: Array, params: Tree, frozen: Tree, clusters: Array, centroids: Array, start: Array
    ) -> Array:
      devices, size = sharding.row_devices(self.mesh), self.prototype_block(len(rows))

      def by_device(x: Array) -> Array:
        return sharding.constrain(x.reshape(devices, -1, *x.shape[1:]), "row", *("vector",) * x.ndim)

      def block(x: Array) -> Array:
        taken = jax.lax.dynamic_slice_in_dim(by_device(x), start, size, axis=1)
        return sharding.constrain(taken.reshape(-1, *x.shape[1:]), "row", *("vector",) * (x.ndim - 1))

      with sharding.use_mesh(self.mesh):
        model = self.model.bind(join_params(params, frozen))
        prototypes = model.prototypes(block(rows), block(clusters), block(centroids))
        prototypes = by_device(sharding.constrain(prototypes, "row", "vector"))
        updated = jax.lax.dynamic_update_slice_in_dim(by_device(rows), prototypes, start, axis=1)
      return updated.reshape(rows.shape)

    return jax.jit(
      prototype_block, donate_argnums=0, out_shardings=sharding.named_sharding(self.mesh, "query", "vector")
    )

  def prototype_block(self, num_rows: int) -> int:
    """Returns the number of labels whose prototypes a device computes at a time, given the rows with padding."""
    devices = sharding.row_devices(self.mesh)
    return largest_divisor(num_rows // devices, max(_BLOCK // devices, 1))

  @functools.cached_property
  def prototype_program(self) -> jax.stages.Wrapped:
    """The jitted `(params, frozen, pooled, clusters, centroids) -> prototypes` of one block of labels."""

    def prototypes(params: Tree, frozen: Tree, pooled: Array, clusters: Array, centroids: Array) -> Array:
      return self.model.bind(join_params(params, frozen)).prototypes(pooled, clusters, centroids)

    return jax.jit(prototypes, out_shardings=sharding.named_sharding(self.mesh))

  def embed_rows(self, params: Tree, items: Items, name: str = "items", into: Array | None = None) -> ShardedRows:
    """Returns plain embeddings of queries or labels, float32 [items, D] of unit norm, which stay on the devices.

    Args:
      params: trained parameters.
      items: texts and images.
      name: what the progress bar calls the items.
      into: float32 [items rounded up, D], an array whose memory is reused; it cannot be read afterwards.
    """
    return self._stored(params, items, name, normalized=True, into=into)

  def pool_rows(self, params: Tree, items: Items, name: str = "items") -> ShardedRows:
    """Returns pooled encoder outputs before normalization, which stay on the devices; arguments as for `embed_rows`."""
    return self._stored(params, items, name, normalized=False)

  def prototype_rows(
    self, params: Tree, pooled: ShardedRows, clusters: np.ndarray, centroids: Array, *, donate: bool = False
  ) -> ShardedRows:
    """Returns label prototypes, float32 [L, D] of unit norm (PRIME, arXiv 2410.20401), which stay on the devices.

    Args:
      params: trained parameters.
      pooled: pooled encoder outputs of the labels, from `pool_rows`.
      clusters: int32 [L] on the host, the free vector of each label.
      centroids: [L rounded up, D], sharded by rows like `pooled`.
      donate: whether the memory of `pooled` is reused, which cannot be read afterwards.
    """
    where = sharding.named_sharding(self.mesh, "label")
    num_rows = len(pooled.values)
    placed = sharding.to_global(_zero_padded(np.asarray(clusters, np.int32), num_rows), where)
    rows = pooled.values if donate else jnp.copy(pooled.values)
    block = self.prototype_block(num_rows)
    with stage(f"compute {len(pooled):,} prototypes", logged=len(pooled) >= LONG):
      for start in range(0, num_rows // sharding.row_devices(self.mesh), block):
        rows = self.prototype_rows_program(rows, params, self.frozen, placed, centroids, np.int32(start))
      rows.block_until_ready()
    return ShardedRows(rows, len(pooled))

  def _stored(
    self, params: Tree, items: Items, name: str, *, normalized: bool, into: Array | None = None
  ) -> ShardedRows:
    """Encodes items chunk by chunk into sharded rows; a few chunks are in flight."""
    values = sharded_rows.zeros(len(items), self.model.embed_dim, self.mesh).values if into is None else into
    replicated = sharding.named_sharding(self.mesh)
    pending: list[Array] = []
    with stage(f"encode {len(items):,} {name}", total=len(items), unit="item") as progress:
      for first, packed in self._packed_blocks(items):
        for members, slots, inputs in self._chunks(packed, self.features):
          ids = np.full(self.layout.chunk_rows * self.layout.slots, -1, np.int32)
          ids[slots] = first + members
          values, count = self.store_program(
            values,
            params,
            self.frozen,
            inputs,
            self._table(self.features),
            sharding.to_global(ids, replicated),
            normalized=normalized,
          )
          pending.append(count)
          if len(pending) > _IN_FLIGHT:
            progress.advance(int(pending.pop(0)))
      for count in pending:
        progress.advance(int(count))
    return ShardedRows(values, len(items))

  def pooled(
    self, params: Tree, items: Items, name: str = "items", features: ImageFeatures | None = None
  ) -> np.ndarray:
    """Returns pooled encoder outputs before normalization.

    Args:
      params: trained parameters.
      items: texts and images.
      name: what the progress bar calls the items.
      features: features of the items' images; by default the encoder's. All features on the host run one program.

    Returns:
      float32 [items, D] on the host, whole on every process.
    """
    out = np.empty((len(items), self.model.embed_dim), np.float32)
    self._run(out, self._packed_blocks(items), params, features, name)
    return out

  def pooled_packed(
    self, params: Tree, packed: PackedItems, features: ImageFeatures | None = None, name: str = "items"
  ) -> np.ndarray:
    """Returns the outputs of `pooled` for items that are packed already, by the layout's `chunk_rows`."""
    out = np.empty((len(packed.slots), self.model.embed_dim), np.float32)
    self._run(out, iter([(0, packed)]), params, features, name)
    return out

  def embed(self, params: Tree, items: Items, name: str = "items", features: ImageFeatures | None = None) -> np.ndarray:
    """Returns plain embeddings of queries or labels, float32 [items, D] of unit norm; arguments as for `pooled`."""
    pooled = self.pooled(params, items, name, features)
    return np.divide(pooled, _norms(pooled), out=pooled)

  def prototypes(self, params: Tree, pooled: np.ndarray, clusters: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Returns label prototypes, float32 [L, D] of unit norm (PRIME, arXiv 2410.20401).

    Args:
      params: trained parameters.
      pooled: float32 [L, D], pooled encoder outputs of the labels.
      clusters: int32 [L], the free vector of each label.
      centroids: float32 [L, D].
    """
    out = np.empty_like(pooled)
    replicated = sharding.named_sharding(self.mesh)
    for start in range(0, len(pooled), _BLOCK):
      part = slice(start, start + _BLOCK)
      arrays = (
        sharding.to_global(_zero_padded(x[part], min(_BLOCK, len(pooled))), replicated)
        for x in (pooled, clusters, centroids)
      )
      out[part] = np.asarray(self.prototype_program(params, self.frozen, *arrays))[: len(pooled[part])]
    return out

  def _packed_blocks(self, items: Items) -> Iterator[tuple[int, PackedItems]]:
    """Yields the first item of each block, and the block packed."""
    for start in range(0, len(items), _BLOCK):
      block = np.arange(start, min(start + _BLOCK, len(items)))
      yield start, pack(items.take(block), self.layout, round_up=False)

  def _run(
    self,
    out: np.ndarray,
    blocks: Iterator[tuple[int, PackedItems]],
    params: Tree,
    features: ImageFeatures | None,
    name: str,
  ) -> None:
    """Fills `out` [items, D] chunk by chunk; a few chunks are in flight."""
    pending: list[tuple[np.ndarray, np.ndarray, Array]] = []
    features = features or self.features
    with stage(f"encode {len(out):,} {name}", total=len(out), unit="item", logged=False) as progress:
      for first, packed in blocks:
        for members, slots, inputs in self._chunks(packed, features):
          pooled = self.pool_program(params, self.frozen, inputs, self._table(features))
          pending.append((first + members, slots, pooled))
          if len(pending) > _IN_FLIGHT:
            progress.advance(_collect(out, *pending.pop(0)))
      for chunk in pending:
        progress.advance(_collect(out, *chunk))

  def _chunks(
    self, packed: PackedItems, features: ImageFeatures | None
  ) -> Iterator[tuple[np.ndarray, np.ndarray, EncoderInputs]]:
    """Yields for every chunk the items in it, their slots within the chunk, and its inputs on the mesh."""
    per_chunk = self.layout.chunk_rows * self.layout.slots
    chunk_of = packed.slots // per_chunk
    order = np.argsort(chunk_of, kind="stable")
    bounds = np.searchsorted(chunk_of[order], np.arange(len(packed.tokens) + 1))
    for chunk in range(len(packed.tokens)):
      members = order[bounds[chunk] : bounds[chunk + 1]]
      yield members, packed.slots[members] - chunk * per_chunk, chunk_on_mesh(packed, chunk, features, self.mesh)

  def _table(self, features: ImageFeatures | None) -> Array | None:
    """Returns the image features on the devices, if they are there."""
    return None if features is None else features.on_devices


def encoding_layout(layout: PackedLayout, mesh: Mesh) -> PackedLayout:
  """Returns the layout in which items are encoded without a backward pass: on CPUs, with smaller chunks.

  Args:
    layout: The layout of training, whose chunks the mesh divides.
    mesh: The devices.
  """
  if sharding.platform_of(mesh) != "cpu":
    return layout
  rows = max(_CPU_TOKENS // layout.row_length, 1) * sharding.row_devices(mesh)
  return dataclasses.replace(layout, chunk_rows=min(layout.chunk_rows, rows))


def normalize(vectors: np.ndarray) -> np.ndarray:
  """Returns vectors [N, D] at unit norm, as a new array; a zero vector stays zero."""
  return vectors / _norms(vectors)


def _norms(vectors: np.ndarray) -> np.ndarray:
  return np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _MIN_NORM)


def _zero_padded(rows: np.ndarray, size: int) -> np.ndarray:
  """Returns rows with zeros below, so that the last block runs the program of the others."""
  return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _collect(out: np.ndarray, members: np.ndarray, slots: np.ndarray, pooled: Array) -> int:
  out[members] = np.asarray(pooled).reshape(-1, out.shape[1])[slots]
  return len(members)
