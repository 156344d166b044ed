"""BERT-family text encoders (BERT, MiniLM, DistilBERT) over packed rows of texts."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.models import layers
from vixml_jax.models.attention_call import AUTO
from vixml_jax.models.text_encoder import TextEncoder
from vixml_jax.models.transformer import PostNormLayer, check_saved, scan_layers, stack_layers
from vixml_jax.typing import Array, Bool, Float, Int, Key


class BertEncoder(TextEncoder):
  """Post-norm transformer encoder with learned positions.

  Args:
    vocab_size: Number of word pieces.
    num_layers: Number of layers.
    embed_dim: D.
    num_heads: Number of attention heads, a divisor of D.
    mlp_dim: Width of the feed-forward networks.
    max_position: Number of positions; all `positions` must be below it.
    num_token_types: Rows of the token type table, of which every token uses row 0; 0 for no such table, as in
      DistilBERT.
    dropout: Dropout rate of the embeddings and of the outputs of the feed-forward networks.
    attention_dropout: Dropout rate of the attention probabilities.
    projection_dropout: Dropout rate of the outputs of the attention; 0 in DistilBERT.
    layer_norm_eps: Added to the variance in every norm.
    dtype: Dtype of the computation. Parameters, norms and softmax are float32.
    residual_dtype: Dtype of the residual stream and of what the norms return; "" for `dtype`. "float32" with a
      `dtype` of 16 bits computes what torch.autocast does: matrix products in 16 bits, everything else in 32.
    remat: Whether to recompute the activations of each layer in the backward pass.
    remat_saved: Names (`transformer.SAVED_NAMES`) of activations that `remat` stores instead; a layer has no "gate".
    attention: Implementation of the attention; see `attention.segment_attention`.
    rngs: Source of the initial values (normal, standard deviation 0.02).

  Reference: BERT (arXiv 1810.04805); DistilBERT (arXiv 1910.01108); MiniLM (arXiv 2002.10957).
  """

  def __init__(
    self,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    mlp_dim: int,
    max_position: int,
    num_token_types: int,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    projection_dropout: float = 0.1,
    layer_norm_eps: float = 1e-12,
    dtype: str = "float32",
    residual_dtype: str = "",
    remat: bool = False,
    remat_saved: tuple[str, ...] = (),
    attention: str = AUTO,
    *,
    rngs: nnx.Rngs,
  ):
    self.num_layers = num_layers
    self.embed_dim = embed_dim
    self.dropout = dropout
    self.dtype = dtype
    self.residual_dtype = residual_dtype
    self.remat = remat
    self.remat_saved = check_saved(remat_saved)
    self.word_embedding = _embedding("vocab", vocab_size, embed_dim, rngs)
    self.position_embedding = _embedding("position", max_position, embed_dim, rngs)
    self.token_type_embedding = _embedding("token_type", num_token_types, embed_dim, rngs) if num_token_types else None
    self.embedding_norm = layers.LayerNorm(embed_dim, layer_norm_eps)

    def make_layer(layer_rngs: nnx.Rngs) -> PostNormLayer:
      return PostNormLayer(
        embed_dim,
        num_heads,
        mlp_dim,
        dropout=dropout,
        attention_dropout=attention_dropout,
        projection_dropout=projection_dropout,
        layer_norm_eps=layer_norm_eps,
        dtype=dtype,
        attention=attention,
        rngs=layer_rngs,
      )

    self.layers = stack_layers(make_layer, num_layers, rngs)

  def encode(
    self,
    x: Float[Array, "*chunks R T D"],
    segments: Int[Array, "*chunks R T"],
    positions: Int[Array, "*chunks R T"],
    key: Key[Array, ""] | None = None,
    filled: Bool[Array, "*chunks"] | None = None,
  ) -> Float[Array, "*chunks R T D"]:
    """Encodes rows of word vectors; see `TextEncoder.encode`."""
    return self._run(x, segments, positions, key, filled=filled)[1]

  def encode_layers(
    self,
    x: Float[Array, "R T D"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "layers R T D"]:
    """Returns the input and the output of every layer; see `TextEncoder.encode_layers`."""
    x, _, outputs = self._run(x, segments, positions, key, return_layers=True)
    return jnp.concatenate([x[None], outputs])

  def _run(
    self,
    x: Array,
    segments: Array,
    positions: Array,
    key: Array | None,
    *,
    return_layers: bool = False,
    filled: Array | None = None,
  ) -> tuple[Array, Array, Any]:
    """Returns the input of the layers, the output of the last one and, with `return_layers`, those of all."""
    embed_key, layers_key = layers.split_key(key, 2)
    x = self._add_positions(x, positions, embed_key)
    keys = None if layers_key is None else jax.random.split(layers_key, self.num_layers)

    def apply(layer: PostNormLayer, hidden: Array, segments: Array, layer_key: Array | None, _: None) -> Array:
      return layer(hidden, segments, layer_key)

    return x, *scan_layers(
      self.layers,
      x,
      apply,
      segments,
      keys,
      remat=self.remat,
      saved=self.remat_saved,
      return_layers=return_layers,
      filled=filled,
    )

  def _add_positions(self, x: Array, positions: Array, key: Array | None) -> Array:
    """Adds the vectors of token type 0 and of positions [..., T] to x [..., T, D], then applies norm and dropout."""
    x = x.astype(self.stream_dtype) + self.position_embedding[...][positions].astype(self.stream_dtype)
    if self.token_type_embedding is not None:
      x = x + self.token_type_embedding[0].astype(self.stream_dtype)
    return layers.dropout(self.embedding_norm(x), self.dropout, key)


def _embedding(axis: str, rows: int, embed_dim: int, rngs: nnx.Rngs) -> nnx.Param[Array]:
  table = layers.normal_init(rngs.params(), (rows, embed_dim), jnp.float32)
  return nnx.Param(table, axes=(axis, "embed"))
