"""BERT-family text encoders (BERT, MiniLM, DistilBERT) over packed rows of texts."""

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.models import layers
from vixml_jax.typing import Array, Float, Int, Key


class BertEncoder(nnx.Module):
  """Post-norm transformer encoder with learned positions.

  Input rows are packed: several texts stand in a row, told apart by `segments`; `positions`
  restart at 0 in each of them. A text's output does not depend on what shares its row.

  Args:
    vocab_size: number of word pieces.
    num_layers: depth.
    embed_dim: D.
    num_heads: attention heads, a divisor of D.
    mlp_dim: width of the feed-forward parts.
    max_position: positions known, all of `positions` lie below it.
    num_token_types: rows of the token type table (every token is of type 0); 0 for no such
      table, as in DistilBERT.
    dropout: rate on the embeddings and on the outputs of the feed-forward parts.
    attention_dropout: rate on the attention probabilities.
    projection_dropout: rate on the outputs of the attention; DistilBERT has 0.
    layer_norm_eps: added to the variance in every norm.
    dtype: of the computation; parameters, norms and softmax are f32.
    remat: recompute the layers' activations in the backward pass.
    rngs: source of the initial values (normal, standard deviation 0.02).
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
    remat: bool = False,
    *,
    rngs: nnx.Rngs,
  ):
    self.num_layers = num_layers
    self.embed_dim = embed_dim
    self.dropout = dropout
    self.dtype = dtype
    self.remat = remat
    self.word_embedding = _embedding("vocab", vocab_size, embed_dim, rngs)
    self.position_embedding = _embedding("position", max_position, embed_dim, rngs)
    self.token_type_embedding = _embedding("token_type", num_token_types, embed_dim, rngs) if num_token_types else None
    self.embedding_norm = layers.LayerNorm(embed_dim, layer_norm_eps)

    def make_layer(layer_rngs: nnx.Rngs) -> layers.PostNormLayer:
      return layers.PostNormLayer(
        embed_dim,
        num_heads,
        mlp_dim,
        dropout=dropout,
        attention_dropout=attention_dropout,
        projection_dropout=projection_dropout,
        layer_norm_eps=layer_norm_eps,
        dtype=dtype,
        rngs=layer_rngs,
      )

    self.layers = layers.stack_layers(make_layer, num_layers, rngs)

  def __call__(
    self,
    tokens: Int[Array, "R T"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "R T D"]:
    """Encodes packed rows.

    Args:
      tokens: int32 [R, T].
      segments: int32 [R, T], 0 for padding.
      positions: int32 [R, T], from 0 in each text.
      key: random key for dropout; None for a deterministic run.

    Returns:
      Hidden states [R, T, D] in `dtype`; those of padding have no meaning.
    """
    return self.encode(self.embed_tokens(tokens), segments, positions, key)

  def embed_tokens(self, tokens: Int[Array, "R T"]) -> Float[Array, "R T D"]:
    """Word vectors [R, T, D] of tokens [R, T]; other vectors may take their places."""
    return self.word_embedding[...][tokens].astype(self.dtype)

  def encode(
    self,
    x: Float[Array, "R T D"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "R T D"]:
    """Runs the encoder over embedded rows [R, T, D]; arguments as in `__call__`."""
    return self._run(x, segments, positions, key, return_layers=False)[1]

  def encode_layers(
    self,
    x: Float[Array, "R T D"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "layers R T D"]:
    """As `encode`, but the layers' input and every layer's output: [num_layers + 1, R, T, D]."""
    x, _, outputs = self._run(x, segments, positions, key, return_layers=True)
    return jnp.concatenate([x[None], outputs])

  def _run(self, x, segments, positions, key, return_layers):
    embed_key, layers_key = layers.split_key(key, 2)
    x = self._add_positions(x, positions, embed_key)
    keys = None if layers_key is None else jax.random.split(layers_key, self.num_layers)

    def apply(layer, hidden, layer_key):
      return layer(hidden, segments, layer_key)

    return x, *layers.scan_layers(self.layers, x, apply, keys, self.remat, return_layers)

  def _add_positions(self, x, positions, key):
    """Adds token type 0 and positions [R, T] to vectors [R, T, D], then norm and dropout."""
    x = x.astype(self.dtype) + self.position_embedding[...][positions].astype(self.dtype)
    if self.token_type_embedding is not None:
      x = x + self.token_type_embedding[0].astype(self.dtype)
    return layers.dropout(self.embedding_norm(x), self.dropout, key)


def _embedding(axis: str, rows: int, embed_dim: int, rngs: nnx.Rngs) -> nnx.Param:
  table = layers.normal_init(rngs.params(), (rows, embed_dim), jnp.float32)
  return nnx.Param(table, axes=(axis, "embed"))
