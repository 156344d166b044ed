"""The whole model: one encoder of texts and images for queries and labels, free vectors, the prototype network."""

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.models import layers
from vixml_jax.models.bert import BertEncoder
from vixml_jax.models.decoder import Decoder
from vixml_jax.models.fusion import ImageFusion, ImageTokens
from vixml_jax.models.prototype import PrototypeNetwork
from vixml_jax.typing import Array, Float, Int

ARCHITECTURES = {"bert": BertEncoder, "decoder": Decoder}
POOLINGS = ("mean", "last")


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
  """Unit norm over the last dimension, in float32; a zero vector stays zero, with zero gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


class DualEncoder(nnx.Module):
  """One encoder shared by queries and labels, and what turns labels into prototypes.

  Args:
    encoder: keyword arguments of the encoder.
    prototype: keyword arguments of `PrototypeNetwork` besides `embed_dim`.
    num_free_vectors: C; labels of one cluster share a free vector.
    fusion: keyword arguments of `ImageFusion` besides the encoder's sizes; None for texts only. The layer of late
      fusion has the encoder's number of heads and width of the feed-forward part, whichever encoder it is.
    architecture: "bert" for a `BertEncoder`, "decoder" for a `Decoder`.
    pooling: "mean" over all places of an item, images included; or "last", the item's last place alone, which is the
      only one that has seen all of it where attention is causal.
    rngs: source of the initial values.
  """

  def __init__(
    self,
    encoder: dict,
    prototype: dict,
    num_free_vectors: int,
    fusion: dict | None = None,
    architecture: str = "bert",
    pooling: str = "mean",
    *,
    rngs: nnx.Rngs,
  ):
    if architecture not in ARCHITECTURES or pooling not in POOLINGS:
      raise ValueError(
        f"architecture {architecture!r} and pooling {pooling!r}: known are {tuple(ARCHITECTURES)} and {POOLINGS}"
      )
    self.pooling = pooling
    self.encoder = ARCHITECTURES[architecture](**encoder, rngs=rngs)
    embed_dim = self.encoder.embed_dim
    self.prototype = PrototypeNetwork(embed_dim, **prototype, rngs=rngs)
    xavier = jax.nn.initializers.xavier_uniform()
    self.free_vectors = nnx.Param(
      xavier(rngs.params(), (num_free_vectors, embed_dim), jnp.float32), axes=("free_vector", "vector")
    )
    shared = ("num_heads", "mlp_dim", "dropout", "layer_norm_eps", "dtype")
    self.fusion = (
      None
      if fusion is None
      else ImageFusion(
        embed_dim=embed_dim, **{name: encoder[name] for name in shared if name in encoder}, **fusion, rngs=rngs
      )
    )

  def pool(
    self,
    tokens: Int[Array, "R T"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    num_slots: int,
    images: ImageTokens | None = None,
    key: Array | None = None,
  ) -> Float[Array, "R S D"]:
    """Pooled encoder output of every item of packed rows, before the norm; zeros for empty slots.

    Args:
      tokens: token ids; any id where early fusion puts an image.
      segments: slot 1..S of each place, images included; 0 for padding.
      positions: position of each place within its item.
      num_slots: S.
      images: the rows' images; needed by a model with `fusion`, and only there.
      key: random key for dropout; None for a deterministic run.
    """
    if (self.fusion is None) != (images is None):
      raise ValueError("a model takes images if it was made with `fusion`, and then always")
    x = self.encoder.embed_tokens(tokens)
    if self.fusion is not None and images is not None and self.fusion.method == "early":
      x = self.fusion.place(x, images)
    hidden = self.encoder.encode(x, segments, positions, key)
    counted = layers.last_places(segments) if self.pooling == "last" else segments
    pooled = layers.pool_segments(hidden, counted, num_slots)
    if self.fusion is None or images is None:
      return pooled
    if self.fusion.method == "late":
      return self.fusion.mix(pooled, images, None if key is None else jax.random.fold_in(key, 2))
    return self.fusion.add_residual(pooled, images)

  def prototypes(
    self,
    pooled: Float[Array, "B D"],
    clusters: Int[Array, "B"],
    centroids: Float[Array, "B D"],
    key: Array | None = None,
  ) -> Float[Array, "B D"]:
    """Unit-norm prototypes of labels.

    Args:
      pooled: pooled encoder outputs of the label texts, before the norm.
      clusters: which free vector each label uses, 0..C-1.
      centroids: the labels' centroids.
      key: random key for dropout.
    """
    return l2_normalize(self.prototype(pooled, self.free_vectors[...][clusters], centroids, key))
