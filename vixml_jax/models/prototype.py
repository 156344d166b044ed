"""The PRIME prototype network: a label's text, its cluster's free vector and its centroid become one vector."""

from flax import nnx
import jax.numpy as jnp

from vixml_jax.models import layers
from vixml_jax.typing import Array, Float


class PrototypeNetwork(nnx.Module):
  """Mean of the outputs of one post-norm transformer layer over three unordered vectors.

  Args:
    embed_dim: D.
    num_heads: attention heads.
    mlp_dim: width of the feed-forward part.
    dropout: rate on attention probabilities, attention output, inside and after the feed-forward part.
    layer_norm_eps: added to the variance.
    rngs: source of the initial values.

  Computed in float32: it is a thousandth of the encoder's work and its inputs differ in scale.

  Reference: PRIME (arXiv 2410.20401), label prototype network; METHOD "PRIME: label prototypes".
  """

  def __init__(
    self,
    embed_dim: int,
    num_heads: int = 8,
    mlp_dim: int = 1024,
    dropout: float = 0.1,
    layer_norm_eps: float = 1e-5,
    *,
    rngs: nnx.Rngs,
  ):
    self.layer = layers.PostNormLayer(
      embed_dim,
      num_heads,
      mlp_dim,
      dropout=dropout,
      attention_dropout=dropout,
      projection_dropout=dropout,
      activation_dropout=dropout,
      layer_norm_eps=layer_norm_eps,
      kernel_init=layers.fan_in_uniform,
      rngs=rngs,
    )

  def __call__(
    self,
    pooled: Float[Array, "B D"],
    free_vectors: Float[Array, "B D"],
    centroids: Float[Array, "B D"],
    key: Array | None = None,
  ) -> Float[Array, "B D"]:
    """Prototypes before the norm.

    Args:
      pooled: the labels' pooled encoder outputs, before the L2 norm.
      free_vectors: the free vectors of the labels' clusters.
      centroids: the labels' centroids; zero for a label without training queries.
      key: random key for dropout; None for a deterministic run.
    """
    vectors = jnp.stack([pooled, free_vectors, centroids], axis=1).astype(jnp.float32)
    return self.layer(vectors, None, key).mean(axis=1)
