"""Encodes any number of texts with a trained model: packed, chunk by chunk, over the whole mesh."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
from jax.sharding import Mesh
import numpy as np
from tqdm import tqdm

from vixml_jax import sharding
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.ragged import Ragged
from vixml_jax.typing import Array, Tree

# Texts packed at a time: enough that best-fit finds partners for the long ones, little enough to hold.
_BLOCK = 16384
# Chunks in flight: the host packs and copies while the device computes.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """Embeds texts without dropout.

  Attributes:
    model: the model's definition.
    layout: shape of packed rows.
    mesh: devices; rows are spread over them, parameters lie where they are.
  """

  model: ModelDefinition
  layout: PackedLayout
  mesh: Mesh

  @functools.cached_property
  def _pool(self):
    def pool(params, tokens, segments, positions):
      return self.model.bind(params).pool(tokens, segments, positions, self.layout.slots)

    return jax.jit(pool, out_shardings=sharding.named_sharding(self.mesh))

  @functools.cached_property
  def _prototypes(self):
    def prototypes(params, pooled, clusters, centroids):
      return self.model.bind(params).prototypes(pooled, clusters, centroids)

    return jax.jit(prototypes, out_shardings=sharding.named_sharding(self.mesh))

  def pooled(self, params: Tree, texts: Ragged, name: str = "texts") -> np.ndarray:
    """Pooled encoder outputs before the norm.

    Args:
      params: parameters of the model.
      texts: token ids, one text a row.
      name: what the progress bar calls them.

    Returns:
      float32 [texts, D] on the host, whole on every process.
    """
    out = np.empty((len(texts), self.model.embed_dim), np.float32)
    pending = []
    with tqdm(total=len(texts), desc=f"encode {name}", unit="text", disable=None, leave=False) as progress:
      for rows, slots, pooled in self._chunks(params, texts):
        pending.append((rows, slots, pooled))
        if len(pending) > _IN_FLIGHT:
          progress.update(_collect(out, *pending.pop(0)))
      for item in pending:
        progress.update(_collect(out, *item))
    return out

  def _chunks(self, params: Tree, texts: Ragged) -> Iterator[tuple[np.ndarray, np.ndarray, Array]]:
    """For every chunk: which texts it holds, their slots in it, and the pooled vectors [R, S, D]."""
    where = sharding.named_sharding(self.mesh, "row", "vector")
    per_chunk = self.layout.chunk_rows * self.layout.slots
    for start in range(0, len(texts), _BLOCK):
      block = np.arange(start, min(start + _BLOCK, len(texts)))
      packed = pack(texts.take(block), self.layout, round_up=False)
      chunk_of = packed.slots // per_chunk
      order = np.argsort(chunk_of, kind="stable")
      bounds = np.searchsorted(chunk_of[order], np.arange(len(packed.tokens) + 1))
      for chunk in range(len(packed.tokens)):
        arrays = (sharding.to_global(x[chunk], where) for x in (packed.tokens, packed.segments, packed.positions))
        members = order[bounds[chunk]:bounds[chunk + 1]]
        yield block[members], packed.slots[members] - chunk * per_chunk, self._pool(params, *arrays)

  def queries(self, params: Tree, texts: Ragged, name: str = "queries") -> np.ndarray:
    """Unit-norm plain embeddings, float32 [texts, D]."""
    return _normalize(self.pooled(params, texts, name))

  def prototypes(
      self, params: Tree, texts: Ragged, clusters: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Unit-norm label prototypes, float32 [L, D].

    Args:
      params: parameters of the model.
      texts: token ids of the labels.
      clusters: int32 [L], the free vector of each label.
      centroids: float32 [L, D].
    """
    pooled = self.pooled(params, texts, "labels")
    out = np.empty_like(pooled)
    replicated = sharding.named_sharding(self.mesh)
    for start in range(0, len(pooled), _BLOCK):
      part = slice(start, start + _BLOCK)
      arrays = (
          sharding.to_global(_fill(x[part], min(_BLOCK, len(pooled))), replicated)
          for x in (pooled, clusters, centroids))
      out[part] = np.asarray(self._prototypes(params, *arrays))[:len(pooled[part])]
    return out


def _fill(rows: np.ndarray, size: int) -> np.ndarray:
  """Rows with zeros below, so that the last block runs the program of the others."""
  return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _collect(out: np.ndarray, rows: np.ndarray, slots: np.ndarray, pooled: Array) -> int:
  out[rows] = np.asarray(pooled).reshape(-1, out.shape[1])[slots]
  return len(rows)


def _normalize(pooled: np.ndarray) -> np.ndarray:
  """Unit norm in place, on the host where the vectors are; a zero vector stays zero."""
  pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
  return pooled
