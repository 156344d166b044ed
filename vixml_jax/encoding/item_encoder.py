"""Encodes any number of items with a trained model: packed, chunk by chunk, over the whole mesh."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
from jax.sharding import Mesh
import numpy as np
from tqdm import tqdm

from vixml_jax import sharding
from vixml_jax.encoding.inputs import EncoderInputs, chunk_on_mesh, image_tokens
from vixml_jax.images.features import ImageFeatures
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedItems, PackedLayout, pack
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.parameters import join_params
from vixml_jax.typing import Array, Tree

# Items packed at a time: enough for best-fit to find partners for long items, few enough to hold in memory.
_BLOCK = 16384
# Chunks in flight: the host packs and copies the next ones while the devices compute.
_IN_FLIGHT = 2
_MIN_NORM = 1e-12


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

  @functools.cached_property
  def pool_program(self) -> jax.stages.Wrapped:
    """The jitted `(params, frozen, inputs, features) -> pooled outputs [R, S, D]` of one chunk."""

    def pool(params: Tree, frozen: Tree, inputs: EncoderInputs, features: Array | None) -> Array:
      images = image_tokens(inputs.images, features)
      model = self.model.bind(join_params(params, frozen))
      with sharding.use_mesh(self.mesh):
        return model.pool(inputs.tokens, inputs.segments, inputs.positions, self.layout.slots, images)

    return jax.jit(pool, out_shardings=sharding.named_sharding(self.mesh))

  @functools.cached_property
  def prototype_program(self) -> jax.stages.Wrapped:
    """The jitted `(params, frozen, pooled, clusters, centroids) -> prototypes` of one block of labels."""

    def prototypes(params: Tree, frozen: Tree, pooled: Array, clusters: Array, centroids: Array) -> Array:
      return self.model.bind(join_params(params, frozen)).prototypes(pooled, clusters, centroids)

    return jax.jit(prototypes, out_shardings=sharding.named_sharding(self.mesh))

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
    with tqdm(total=len(out), desc=f"encode {name}", unit="item", disable=None, leave=False) as progress:
      for first, packed in blocks:
        for members, slots, pooled in self._chunks(params, packed, features):
          pending.append((first + members, slots, pooled))
          if len(pending) > _IN_FLIGHT:
            progress.update(_collect(out, *pending.pop(0)))
      for chunk in pending:
        progress.update(_collect(out, *chunk))

  def _chunks(
    self, params: Tree, packed: PackedItems, features: ImageFeatures | None
  ) -> Iterator[tuple[np.ndarray, np.ndarray, Array]]:
    """Yields for every chunk the items in it, their slots within the chunk, and pooled outputs [R, S, D]."""
    per_chunk = self.layout.chunk_rows * self.layout.slots
    chunk_of = packed.slots // per_chunk
    order = np.argsort(chunk_of, kind="stable")
    bounds = np.searchsorted(chunk_of[order], np.arange(len(packed.tokens) + 1))
    table = features and features.on_devices
    for chunk in range(len(packed.tokens)):
      members = order[bounds[chunk] : bounds[chunk + 1]]
      inputs = chunk_on_mesh(packed, chunk, features, self.mesh)
      pooled = self.pool_program(params, self.frozen, inputs, table)
      yield members, packed.slots[members] - chunk * per_chunk, pooled


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
