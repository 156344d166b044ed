"""Encodes any number of items with a trained model: packed, chunk by chunk, over the whole mesh."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
from jax.sharding import Mesh
import numpy as np
from tqdm import tqdm

from vixml_jax import sharding
from vixml_jax.images.features import ImageFeatures
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedImages, PackedLayout, pack
from vixml_jax.models import layers
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.fusion import image_tokens
from vixml_jax.typing import Array, Tree

# Items packed at a time: enough that best-fit finds partners for the long ones, little enough to hold.
_BLOCK = 16384
# Chunks in flight: the host packs and copies while the device computes.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class ItemEncoder:
  """Embeds queries and labels without dropout.

  Attributes:
    model: the model's definition.
    layout: shape of packed rows.
    mesh: devices; rows are spread over them, parameters lie where they are.
    bank: features of the images, for a model that takes images.
    frozen: the parameters that are not trained; those that its methods take are the others.
  """

  model: ModelDefinition
  layout: PackedLayout
  mesh: Mesh
  bank: ImageFeatures | None = None
  frozen: Tree = dataclasses.field(default_factory=dict, repr=False)

  @functools.cached_property
  def _pool(self):
    def pool(params, frozen, tokens, segments, positions, images, bank):
      images = None if images is None else image_tokens(images, bank)
      model = self.model.bind(layers.join_params(params, frozen))
      with sharding.use_mesh(self.mesh):
        return model.pool(tokens, segments, positions, self.layout.slots, images)

    return jax.jit(pool, out_shardings=sharding.named_sharding(self.mesh))

  @functools.cached_property
  def _prototypes(self):
    def prototypes(params, frozen, pooled, clusters, centroids):
      return self.model.bind(layers.join_params(params, frozen)).prototypes(pooled, clusters, centroids)

    return jax.jit(prototypes, out_shardings=sharding.named_sharding(self.mesh))

  def pooled(self, params: Tree, items: Items, name: str = "items", bank: ImageFeatures | None = None) -> np.ndarray:
    """Pooled encoder outputs before the norm.

    Args:
      params: the parameters that are trained.
      items: texts and images.
      name: what the progress bar calls them.
      bank: where their images are; by default the encoder's. Every bank that lies on the host runs the same program.

    Returns:
      float32 [items, D] on the host, whole on every process.
    """
    out = np.empty((len(items), self.model.embed_dim), np.float32)
    pending = []
    with tqdm(total=len(items), desc=f"encode {name}", unit="item", disable=None, leave=False) as progress:
      for rows, slots, pooled in self._chunks(params, items, bank or self.bank):
        pending.append((rows, slots, pooled))
        if len(pending) > _IN_FLIGHT:
          progress.update(_collect(out, *pending.pop(0)))
      for chunk in pending:
        progress.update(_collect(out, *chunk))
    return out

  def _chunks(
    self, params: Tree, items: Items, bank: ImageFeatures | None
  ) -> Iterator[tuple[np.ndarray, np.ndarray, Array]]:
    """For every chunk: which items it holds, their slots in it, and the pooled vectors [R, S, D]."""
    where = sharding.named_sharding(self.mesh, "row", "vector")
    per_chunk = self.layout.chunk_rows * self.layout.slots
    for start in range(0, len(items), _BLOCK):
      block = np.arange(start, min(start + _BLOCK, len(items)))
      packed = pack(items.take(block), self.layout, round_up=False)
      chunk_of = packed.slots // per_chunk
      order = np.argsort(chunk_of, kind="stable")
      bounds = np.searchsorted(chunk_of[order], np.arange(len(packed.tokens) + 1))
      for chunk in range(len(packed.tokens)):
        arrays = (sharding.to_global(x[chunk], where) for x in (packed.tokens, packed.segments, packed.positions))
        members = order[bounds[chunk] : bounds[chunk + 1]]
        images = self._images(packed.images, chunk, bank)
        pooled = self._pool(params, self.frozen, *arrays, images, bank and bank.on_devices)
        yield block[members], packed.slots[members] - chunk * per_chunk, pooled

  def _images(self, images: PackedImages | None, chunk: int, bank: ImageFeatures | None) -> dict[str, Array] | None:
    """One chunk's images on the mesh."""
    if bank is None or images is None:
      return None
    part = PackedImages(images.rows[chunk], images.segments[chunk], images.positions[chunk])
    return bank.on_mesh(part, self.mesh)

  def queries(self, params: Tree, items: Items, name: str = "queries", bank: ImageFeatures | None = None) -> np.ndarray:
    """Unit-norm plain embeddings, float32 [items, D]; arguments as for `pooled`."""
    return normalize(self.pooled(params, items, name, bank))

  def prototypes(self, params: Tree, items: Items, clusters: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Unit-norm label prototypes, float32 [L, D].

    Args:
      params: the parameters that are trained.
      items: texts and images of the labels.
      clusters: int32 [L], the free vector of each label.
      centroids: float32 [L, D].
    """
    return self.prototypes_of(params, self.pooled(params, items, "labels"), clusters, centroids)

  def prototypes_of(self, params: Tree, pooled: np.ndarray, clusters: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """`prototypes` of labels whose pooled encoder outputs, float32 [L, D], are known."""
    out = np.empty_like(pooled)
    replicated = sharding.named_sharding(self.mesh)
    for start in range(0, len(pooled), _BLOCK):
      part = slice(start, start + _BLOCK)
      arrays = (
        sharding.to_global(_fill(x[part], min(_BLOCK, len(pooled))), replicated) for x in (pooled, clusters, centroids)
      )
      out[part] = np.asarray(self._prototypes(params, self.frozen, *arrays))[: len(pooled[part])]
    return out


def _fill(rows: np.ndarray, size: int) -> np.ndarray:
  """Rows with zeros below, so that the last block runs the program of the others."""
  return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _collect(out: np.ndarray, rows: np.ndarray, slots: np.ndarray, pooled: Array) -> int:
  out[rows] = np.asarray(pooled).reshape(-1, out.shape[1])[slots]
  return len(rows)


def normalize(pooled: np.ndarray) -> np.ndarray:
  """Unit norm in place, on the host where the vectors are; a zero vector stays zero."""
  pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
  return pooled
