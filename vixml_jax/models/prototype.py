"""The PRIME prototype network: combines a label's text, its cluster's free vector and its centroid into one vector."""

from flax import nnx
import jax.numpy as jnp

from vixml_jax.models.transformer import PostNormLayer
from vixml_jax.typing import Array, Float, Key


class PrototypeNetwork(nnx.Module):
  """Mean of the outputs of one post-norm transformer layer over three vectors without positions.

  It is always computed in float32, because its three inputs differ in scale and its cost is small beside the encoder's.

  Args:
    embed_dim: D.
    num_heads: Number of attention heads.
    mlp_dim: Width of the feed-forward network.
    dropout: Dropout rate of the attention probabilities, of the attention output, and inside and after the
      feed-forward network.
    layer_norm_eps: Added to the variance in both norms.
    init: Initial values, "torch" or "fan_in"; see `transformer.PostNormLayer`.
    rngs: Source of the initial values.

  Reference: label prototype network of PRIME (arXiv 2410.20401).
  """

  def __init__(
    self,
    embed_dim: int,
    num_heads: int = 8,
    mlp_dim: int = 1024,
    dropout: float = 0.1,
    layer_norm_eps: float = 1e-5,
    init: str = "torch",
    *,
    rngs: nnx.Rngs,
  ):
    self.layer = PostNormLayer(
      embed_dim,
      num_heads,
      mlp_dim,
      dropout=dropout,
      attention_dropout=dropout,
      projection_dropout=dropout,
      activation_dropout=dropout,
      layer_norm_eps=layer_norm_eps,
      init=init,
      rngs=rngs,
    )

  def __call__(
    self,
    pooled: Float[Array, "B D"],
    free_vectors: Float[Array, "B D"],
    centroids: Float[Array, "B D"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "B D"]:
    """Returns the prototypes of labels, before normalization.

    Args:
      pooled: Pooled encoder outputs of the labels, before L2 normalization.
      free_vectors: Free vectors of the labels' clusters.
      centroids: Centroids of the labels; zero for a label without training queries.
      key: Random key of the dropout; None for a deterministic run.
    """
    vectors = jnp.stack([pooled, free_vectors, centroids], axis=1).astype(jnp.float32)
    return self.layer(vectors, None, key).mean(axis=1)
