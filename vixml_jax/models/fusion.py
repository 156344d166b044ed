"""Image features as tokens: an adapter to the token width, and early or late fusion with a text."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.models import layers
from vixml_jax.typing import Array, Float, Int, Key

METHODS = ("early", "late")
ADAPTERS = ("linear", "mlp", "gated")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageTokens:
  """Images of packed rows, in J places a row.

  Attributes:
    features: [R, J, F], one vector an image, not normalized.
    segments: int32 [R, J], slot 1..S of the item that an image belongs to; 0 for an empty place.
    positions: int32 [R, J], where early fusion puts the image in its row, 0..T-1; T for an empty place.
  """

  features: Float[Array, "R J F"]
  segments: Int[Array, "R J"]
  positions: Int[Array, "R J"]


def image_tokens(images: dict[str, Array], bank: Array | None) -> ImageTokens:
  """Images of packed rows with their features.

  Args:
    images: `segments` and `positions` [R, J], with `rows` [R, J] of the bank or `features` [R, J, F].
    bank: feature vectors on the devices, [M, F]; None where `images` has `features`.
  """
  features = images["features"] if bank is None else bank[images["rows"]]
  return ImageTokens(features, images["segments"], images["positions"])


class ImageFusion(nnx.Module):
  """Brings images to the token width, and joins them with texts.

  Args:
    feature_dim: F, width of an image's feature vector.
    embed_dim: D, width of the encoder's tokens and embeddings.
    num_heads: attention heads of late fusion.
    mlp_dim: feed-forward width of late fusion.
    method: "early": an image is a token of the encoder (ViXML, arXiv 2511.13189). "late": self-attention over the
      pooled text and the images, then their mean (as MUFIN does, arXiv 2309.04961).
    adapter: "linear" (the paper): D x F and a bias; "mlp": two linear maps with GELU between; "gated": a linear
      map times the sigmoid of another, so that single features can be turned off.
    residual: whether early fusion also adds a linear map of an item's mean feature vector to its pooled output (not
      in the paper).
    dropout: rate in late fusion's layer.
    layer_norm_eps: of late fusion's norms.
    dtype: of the computation.
    rngs: source of the initial values.
  """

  def __init__(
    self,
    feature_dim: int,
    embed_dim: int,
    num_heads: int,
    mlp_dim: int,
    *,
    method: str = "early",
    adapter: str = "linear",
    residual: bool = False,
    dropout: float = 0.1,
    layer_norm_eps: float = 1e-12,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    if method not in METHODS or adapter not in ADAPTERS:
      raise ValueError(f"method {method!r} and adapter {adapter!r}: known are {METHODS} and {ADAPTERS}")
    if residual and method != "early":
      raise ValueError("residual belongs to early fusion")
    self.method = method
    self.feature_dim = feature_dim
    self.adapter = adapter

    def linear(inputs):
      return layers.Linear(inputs, {"embed": embed_dim}, dtype=dtype, kernel_init=layers.fan_in_uniform, rngs=rngs)

    self.project = linear({"feature": feature_dim})
    self.hidden = linear({"vector": embed_dim}) if adapter == "mlp" else None
    self.gate = linear({"feature": feature_dim}) if adapter == "gated" else None
    self.residual = linear({"feature": feature_dim}) if residual else None
    self.mixer = (
      layers.PostNormLayer(
        embed_dim,
        num_heads,
        mlp_dim,
        dropout=dropout,
        attention_dropout=dropout,
        projection_dropout=dropout,
        layer_norm_eps=layer_norm_eps,
        dtype=dtype,
        rngs=rngs,
      )
      if method == "late"
      else None
    )

  def adapt(self, features: Float[Array, "R J F"]) -> Float[Array, "R J D"]:
    """Image features at the token width."""
    x = self.project(features)
    if self.hidden is not None:
      x = self.hidden(layers.gelu(x))
    if self.gate is not None:
      x = x * jax.nn.sigmoid(self.gate(features))
    return x

  def place(self, x: Float[Array, "R T D"], images: ImageTokens) -> Float[Array, "R T D"]:
    """Early fusion: word vectors [R, T, D] with the images in their places."""
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, images.positions].set(self.adapt(images.features).astype(x.dtype), mode="drop")

  def add_residual(self, pooled: Float[Array, "R S D"], images: ImageTokens) -> Float[Array, "R S D"]:
    """Pooled outputs [R, S, D] with the map of each item's mean features added; items without images stay as they are.

    The map is divided by sqrt(F), so that its kernel is as large as those of the other layers, which learn at its rate.
    """
    if self.residual is None:
      return pooled
    num_slots = pooled.shape[1]
    slots = jnp.arange(1, num_slots + 1, dtype=images.segments.dtype)
    has_images = (images.segments[:, None, :] == slots[:, None]).any(-1, keepdims=True)
    mean = layers.pool_segments(images.features, images.segments, num_slots)
    added = self.residual(mean).astype(pooled.dtype) / math.sqrt(self.feature_dim)
    return pooled + jnp.where(has_images, added, 0)

  def mix(
    self, pooled: Float[Array, "R S D"], images: ImageTokens, key: Key[Array, ""] | None = None
  ) -> Float[Array, "R S D"]:
    """Late fusion: pooled texts [R, S, D] and their images become embeddings, f32 [R, S, D]."""
    if self.mixer is None:
      raise ValueError("early fusion has no layer after the encoder")
    num_slots = pooled.shape[1]
    slots = jnp.broadcast_to(jnp.arange(1, num_slots + 1, dtype=images.segments.dtype), pooled.shape[:2])
    segments = jnp.concatenate([slots, images.segments], axis=1)
    x = jnp.concatenate([pooled, self.adapt(images.features).astype(pooled.dtype)], axis=1)
    return layers.pool_segments(self.mixer(x, segments, key), segments, num_slots)
