"""The whole model: one text encoder for queries and labels, free vectors, and the prototype network."""

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.models import layers
from vixml_jax.models.bert import BertEncoder
from vixml_jax.models.prototype import PrototypeNetwork
from vixml_jax.typing import Array, Float, Int


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
  """Unit norm over the last dimension, in float32; a zero vector stays zero, with zero gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


class DualEncoder(nnx.Module):
  """One encoder shared by queries and labels, and what turns labels into prototypes.

  Args:
    encoder: keyword arguments of `BertEncoder`.
    prototype: keyword arguments of `PrototypeNetwork` besides `embed_dim`.
    num_free_vectors: C; labels of one cluster share a free vector.
    rngs: source of the initial values.
  """

  def __init__(self, encoder: dict, prototype: dict, num_free_vectors: int, *, rngs: nnx.Rngs):
    self.encoder = BertEncoder(**encoder, rngs=rngs)
    embed_dim = self.encoder.embed_dim
    self.prototype = PrototypeNetwork(embed_dim, **prototype, rngs=rngs)
    xavier = jax.nn.initializers.xavier_uniform()
    self.free_vectors = nnx.Param(
        xavier(rngs.params(), (num_free_vectors, embed_dim), jnp.float32), axes=("free_vector", "vector"))

  def pool(
      self, tokens: Int[Array, "R T"], segments: Int[Array, "R T"], positions: Int[Array, "R T"],
      num_slots: int, key: Array | None = None) -> Float[Array, "R S D"]:
    """Mean-pooled encoder output of every text of packed rows, before the norm; zeros for empty slots."""
    return layers.pool_segments(self.encoder(tokens, segments, positions, key), segments, num_slots)

  def prototypes(
      self, pooled: Float[Array, "B D"], clusters: Int[Array, "B"], centroids: Float[Array, "B D"],
      key: Array | None = None) -> Float[Array, "B D"]:
    """Unit-norm prototypes of labels.

    Args:
      pooled: pooled encoder outputs of the label texts, before the norm.
      clusters: which free vector each label uses, 0..C-1.
      centroids: the labels' centroids.
      key: random key for dropout.
    """
    return l2_normalize(self.prototype(pooled, self.free_vectors[...][clusters], centroids, key))
