"""The whole model: one encoder of texts and images for queries and labels, and the vectors that score labels."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.models.bert import BertEncoder
from vixml_jax.models.decoder import Decoder
from vixml_jax.models.fusion import ImageFusion, ImageTokens
from vixml_jax.models.pooling import last_places, pool_segments
from vixml_jax.models.prototype import PrototypeNetwork
from vixml_jax.models.text_encoder import TextEncoder
from vixml_jax.typing import Array, Bool, Float, Int, Key

# The value of `encoder.architecture` in configs -> the class of the encoder. A new encoder is added here.
ARCHITECTURES: dict[str, Callable[..., TextEncoder]] = {"bert": BertEncoder, "decoder": Decoder}
POOLINGS = ("mean", "last")
# The value of `method` in configs -> what the prototype of a label is made of; see `DualEncoder.prototypes`.
METHODS = ("prime", "ngame", "dexa", "mean")

# Arguments of the encoder that the layer of late fusion shares, if the encoder has them.
_SHARED_WITH_FUSION = ("num_heads", "mlp_dim", "dropout", "layer_norm_eps", "dtype")


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
  """Scales vectors to unit norm over the last dimension, in float32.

  It is v / max(|v|, 1e-12), for vectors of any finite norm. A zero vector stays zero, with a finite gradient.

  >>> l2_normalize(jnp.asarray([[3.0, 4.0], [0.0, 0.0]])).round(3)
  Array([[0.6, 0.8],
         [0. , 0. ]], dtype=float32)
  """
  x = x.astype(jnp.float32)
  # The squares of huge vectors overflow, and those of large ones already lose their gradient.
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
  x = x / jnp.where(largest > 1e9, largest, 1.0)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


class DualEncoder(nnx.Module):
  """Encoder that queries and labels share, and what turns the encoding of a label into its prototype.

  Args:
    encoder: Keyword arguments of the encoder.
    prototype: Keyword arguments of `PrototypeNetwork`, except `embed_dim`. Only "prime" has the network.
    num_free_vectors: Number of free vectors C. The labels of a cluster share one. Only "prime" and "dexa"
      have any.
    fusion: Keyword arguments of `ImageFusion`, except the encoder's sizes; None for a model of texts only. The layer
      of late fusion has the encoder's number of heads and feed-forward width.
    architecture: Key of `ARCHITECTURES`, which gives the class of the encoder.
    pooling: "mean" for the mean over all places of an item, images included, or "last" for the item's last place,
      which is the only one that attends to the whole item if attention is causal.
    method: What a prototype is made of; see `prototypes`. One of `METHODS`.
    rngs: Source of the initial values.

  Raises:
    ValueError: If the architecture, the pooling or the method is unknown.
  """

  def __init__(
    self,
    encoder: dict[str, Any],
    prototype: dict[str, Any],
    num_free_vectors: int,
    fusion: dict[str, Any] | None = None,
    architecture: str = "bert",
    pooling: str = "mean",
    method: str = "prime",
    *,
    rngs: nnx.Rngs,
  ):
    if architecture not in ARCHITECTURES:
      raise ValueError(f"architecture {architecture!r}: must be one of {', '.join(ARCHITECTURES)}")
    if pooling not in POOLINGS:
      raise ValueError(f"pooling {pooling!r}: must be one of {', '.join(POOLINGS)}")
    if method not in METHODS:
      raise ValueError(f"method {method!r}: must be one of {', '.join(METHODS)}")
    self.pooling = pooling
    self.method = method
    self.encoder = ARCHITECTURES[architecture](**encoder, rngs=rngs)
    embed_dim = self.encoder.embed_dim
    # One assignment for each: NNX decides at the first one whether an attribute holds parameters.
    self.prototype = PrototypeNetwork(embed_dim, **prototype, rngs=rngs) if method == "prime" else None
    has_free_vectors = method in ("prime", "dexa")
    self.free_vectors = _free_vectors(num_free_vectors, embed_dim, rngs) if has_free_vectors else None
    shared = {name: encoder[name] for name in _SHARED_WITH_FUSION if name in encoder}
    self.fusion = None if fusion is None else ImageFusion(embed_dim=embed_dim, **shared, **fusion, rngs=rngs)

  def pool(
    self,
    tokens: Int[Array, "R T"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    num_slots: int,
    images: ImageTokens | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "R S D"]:
    """Returns the pooled encoder output of every item of packed rows, before normalization.

    Args:
      tokens: Token ids. With early fusion, the ids at the places of images are ignored.
      segments: Slot of each place, 1..S, images included; 0 for padding.
      positions: Position of each place within its item.
      num_slots: Number of slots S in a row.
      images: Images of the rows. Required by a model with `fusion`, and not allowed without.
      key: Random key of the dropout; None for a deterministic run.

    Returns:
      float32 [R, S, D]; zeros for empty slots.

    Raises:
      ValueError: If a model with `fusion` gets no images, or a model without `fusion` gets some.
    """
    hidden = self.encoder.encode(self._embed(tokens, segments, images), segments, positions, key)
    return self._pool_hidden(num_slots, hidden, segments, images, _fusion_key(key))

  def pool_chunks(
    self,
    tokens: Int[Array, "chunks R T"],
    segments: Int[Array, "chunks R T"],
    positions: Int[Array, "chunks R T"],
    num_slots: int,
    filled: Bool[Array, "chunks"],
    images: ImageTokens | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "chunks R S D"]:
    """Returns what `pool` does for the rows of several chunks; each layer runs over one chunk after another.

    The backward pass recomputes a layer chunk by chunk: see `transformer.scan_layers`. The arguments are those of
    `pool`, with a dimension of chunks, and `filled`: which chunks have any item.
    """
    x = jax.vmap(self._embed)(tokens, segments, images)
    hidden = self.encoder.encode(x, segments, positions, key, filled)
    fusion_key = _fusion_key(key)
    keys = None if fusion_key is None else jax.random.split(fusion_key, len(filled))
    return jax.vmap(functools.partial(self._pool_hidden, num_slots))(hidden, segments, images, keys)

  def _embed(self, tokens: Array, segments: Array, images: ImageTokens | None) -> Array:
    """Returns the word vectors of rows [R, T, D], with the images that are tokens in their places."""
    if (self.fusion is None) != (images is None):
      raise ValueError("images must be given if and only if the model was made with `fusion`")
    x = self.encoder.embed_tokens(tokens)
    if self.fusion is not None and images is not None and self.fusion.method == "early":
      x = self.fusion.place(x, segments, images)
    return x

  def _pool_hidden(
    self, num_slots: int, hidden: Array, segments: Array, images: ImageTokens | None, key: Array | None
  ) -> Array:
    """Returns the pooled output of every item [R, S, D] from the hidden states of rows, and from their images."""
    counted = last_places(segments) if self.pooling == "last" else segments
    pooled = pool_segments(hidden, counted, num_slots)
    if self.fusion is None or images is None:
      return pooled
    if self.fusion.method == "late":
      return self.fusion.mix(pooled, images, key)
    return self.fusion.add_residual(pooled, images)

  def prototypes(
    self,
    pooled: Float[Array, "B D"],
    clusters: Int[Array, "B"],
    centroids: Float[Array, "B D"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "B D"]:
    """Returns the unit-norm prototypes of labels, by which labels are scored.

    The method decides what a prototype is, before it is normalized:

    - "ngame": the pooled encoder output (arXiv 2207.04452).
    - "dexa": the sum of the pooled encoder output, which is not normalized, and the free vector (DEXA, KDD 2023;
      `dexa/models/auxiliary_layer.py` of Extreme-classification/dexa).
    - "prime": the output of the prototype network for both and the centroid (arXiv 2410.20401).
    - "mean": the sum of the pooled encoder output and the centroid, both at unit norm. It has no parameters of its own,
      so it suits an encoder that is not trained.

    Args:
      pooled: Pooled encoder outputs of the labels, before normalization.
      clusters: Free vector that each label uses, 0..C-1. Ignored by "ngame" and "mean".
      centroids: Centroids of the labels. Ignored by "ngame" and "dexa".
      key: Random key of the dropout; None for a deterministic run.
    """
    if self.method == "mean":
      return l2_normalize(l2_normalize(pooled) + l2_normalize(centroids))
    if self.free_vectors is None:
      return l2_normalize(pooled)
    free_vectors = self.free_vectors[...][clusters]
    if self.prototype is None:
      return l2_normalize(pooled + free_vectors)
    return l2_normalize(self.prototype(pooled, free_vectors, centroids, key))


def _fusion_key(key: Array | None) -> Array | None:
  """Returns the random key of late fusion, given that of the whole model."""
  return None if key is None else jax.random.fold_in(key, 2)


def _free_vectors(number: int, embed_dim: int, rngs: nnx.Rngs) -> nnx.Param[Array]:
  xavier = jax.nn.initializers.xavier_uniform()
  return nnx.Param(xavier(rngs.params(), (number, embed_dim), jnp.float32), axes=("free_vector", "vector"))
