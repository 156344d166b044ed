"""Image features as tokens: an adapter to the encoder's width, and early or late fusion with a text."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.models import layers
from vixml_jax.models.attention import Attention
from vixml_jax.models.pooling import pool_segments
from vixml_jax.models.transformer import PostNormLayer
from vixml_jax.typing import Array, Float, Int, Key

METHODS = ("early", "late")
ADAPTERS = ("linear", "mlp", "gated", "cross_attention")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageTokens:
  """Images of packed rows, with J places per row; `DualEncoder.pool_chunks` takes those of several chunks.

  Attributes:
    features: One feature vector per image, not normalized, [R, J, F].
    segments: Slot of the item that each image belongs to, 1..S; 0 for an empty place. int32 [R, J].
    positions: Index in the row where early fusion puts each image, 0..T-1; T for an empty place. int32 [R, J].
  """

  features: Float[Array, "*chunks R J F"]
  segments: Int[Array, "*chunks R J"]
  positions: Int[Array, "*chunks R J"]


class ImageFusion(nnx.Module):
  """Maps images to the encoder's width and combines them with texts.

  Args:
    feature_dim: F, width of an image's feature vector.
    embed_dim: D, width of the encoder's tokens and embeddings.
    num_heads: Number of attention heads of late fusion and of cross-attention.
    mlp_dim: Feed-forward width of late fusion.
    method: "early": each image is a token of the encoder (ViXML, arXiv 2511.13189). "late": self-attention over the
      pooled text and the images, followed by their mean (similar to MUFIN, arXiv 2309.04961).
    adapter: Map from F to D. "linear": one linear map (ViXML). "mlp": two linear maps with GELU between them. "gated":
      a linear map, multiplied by the sigmoid of another one, which can turn off single features. "cross_attention": a
      linear map, plus the attention of the image to the words of its item, as the cross-attention layers of Flamingo
      (arXiv 2204.14198) with the parts exchanged; only with early fusion. Its output starts as 0.
    residual: Whether early fusion also adds a linear map of an item's mean feature vector to its pooled output (not in
      the paper).
    dropout: Dropout rate in the layer of late fusion.
    layer_norm_eps: Added to the variance in the norms of late fusion.
    dtype: Dtype of the computation.
    init: Initial values of the maps: "torch" for those of torch.nn.Linear, or "fan_in" for the same with zero biases.
    rngs: Source of the initial values.

  Raises:
    ValueError: If the method or the adapter is unknown, or late fusion is combined with a residual or with
      cross-attention.
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
    init: str = "torch",
    rngs: nnx.Rngs,
  ):
    if method not in METHODS:
      raise ValueError(f"fusion method {method!r}: must be one of {', '.join(METHODS)}")
    if adapter not in ADAPTERS:
      raise ValueError(f"fusion adapter {adapter!r}: must be one of {', '.join(ADAPTERS)}")
    if residual and method != "early":
      raise ValueError("fusion residual: requires early fusion; set the residual to 0 or the method to 'early'")
    if adapter == "cross_attention" and method != "early":
      raise ValueError("fusion adapter 'cross_attention': requires early fusion; set the method to 'early'")
    self.method = method
    self.feature_dim = feature_dim
    self.adapter = adapter

    def linear(inputs: dict[str, int]) -> layers.Linear:
      return layers.Linear(
        inputs,
        {"embed": embed_dim},
        uniform_bias=init == "torch",
        dtype=dtype,
        kernel_init=layers.fan_in_uniform,
        rngs=rngs,
      )

    self.project = linear({"feature": feature_dim})
    self.hidden = linear({"vector": embed_dim}) if adapter == "mlp" else None
    self.gate = linear({"feature": feature_dim}) if adapter == "gated" else None
    self.attention = (
      Attention(
        embed_dim,
        num_heads,
        dtype=dtype,
        kernel_init=layers.fan_in_uniform,
        output_init=jax.nn.initializers.zeros,
        rngs=rngs,
      )
      if adapter == "cross_attention"
      else None
    )
    self.residual = linear({"feature": feature_dim}) if residual else None
    self.mixer = (
      PostNormLayer(
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
    """Maps image features to the encoder's width."""
    x = self.project(features)
    if self.hidden is not None:
      x = self.hidden(layers.gelu(x))
    if self.gate is not None:
      x = x * jax.nn.sigmoid(self.gate(features))
    return x

  def place(self, x: Float[Array, "R T D"], segments: Int[Array, "R T"], images: ImageTokens) -> Float[Array, "R T D"]:
    """Early fusion: returns the word vectors [R, T, D] with the images written to their places.

    Args:
      x: Word vectors. Those at the places of images are ignored.
      segments: Slot of each place, 1..S, images included; 0 for padding.
      images: Images of the rows.
    """
    rows = jnp.arange(x.shape[0])[:, None]
    tokens = self.adapt(images.features)
    if self.attention is not None:
      words = segments.at[rows, images.positions].set(-1, mode="drop")  # An image attends to no image.
      has_words = (images.segments[:, :, None] == words[:, None, :]).any(-1, keepdims=True)
      attended = self.attention.cross(tokens, x, images.segments, words)
      tokens = tokens + jnp.where(has_words, attended, 0)
    return x.at[rows, images.positions].set(tokens.astype(x.dtype), mode="drop")

  def add_residual(self, pooled: Float[Array, "R S D"], images: ImageTokens) -> Float[Array, "R S D"]:
    """Adds a linear map of each item's mean features to its pooled output [R, S, D].

    Items without images are unchanged. The map is divided by sqrt(F), so that its kernel has the same scale as the
    kernels of the other layers, which are trained at the same learning rate.
    """
    if self.residual is None:
      return pooled
    num_slots = pooled.shape[1]
    slots = jnp.arange(1, num_slots + 1, dtype=images.segments.dtype)
    has_images = (images.segments[:, None, :] == slots[:, None]).any(-1, keepdims=True)
    mean = pool_segments(images.features, images.segments, num_slots)
    added = self.residual(mean).astype(pooled.dtype) / math.sqrt(self.feature_dim)
    return pooled + jnp.where(has_images, added, 0)

  def mix(
    self, pooled: Float[Array, "R S D"], images: ImageTokens, key: Key[Array, ""] | None = None
  ) -> Float[Array, "R S D"]:
    """Late fusion: returns the embeddings of pooled texts [R, S, D] and their images, float32 [R, S, D].

    Raises:
      ValueError: If the model uses early fusion, which has no layer after the encoder.
    """
    if self.mixer is None:
      raise ValueError("mix: early fusion has no layer after the encoder; make the model with method='late'")
    num_slots = pooled.shape[1]
    slots = jnp.broadcast_to(jnp.arange(1, num_slots + 1, dtype=images.segments.dtype), pooled.shape[:2])
    segments = jnp.concatenate([slots, images.segments], axis=1)
    x = jnp.concatenate([pooled, self.adapt(images.features).astype(pooled.dtype)], axis=1)
    return pool_segments(self.mixer(x, segments, key), segments, num_slots)
