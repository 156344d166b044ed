"""The interface of text encoders, which `dual_encoder.DualEncoder` calls."""

import abc

from flax import nnx
import jax

from vixml_jax.typing import Array, Bool, Float, Int, Key


class TextEncoder(nnx.Module):
  """Base class of encoders of packed rows of texts.

  A packed row holds several texts: `segments` says which text a token belongs to, and `positions` restart at 0 in each
  text. The hidden states of a text must not depend on the other texts of its row.

  A subclass takes its sizes as keyword arguments, sets the attributes below and `layers`, and implements
  `encode` and `encode_layers`. Every parameter is an `nnx.Param(value, axes=...)` with one logical axis of
  `sharding.RULES` per dimension. An entry in `dual_encoder.ARCHITECTURES` makes the class known to configs.

  Attributes:
    embed_dim: D, width of the hidden states.
    dtype: Dtype of the computation.
    residual_dtype: Dtype of the residual stream and of what the norms return; "" for `dtype`.
    word_embedding: Vectors of the tokens [vocabulary, D], with the logical axes `("vocab", "embed")`.
  """

  embed_dim: int
  dtype: str
  residual_dtype: str = ""
  word_embedding: nnx.Param[jax.Array]

  def __call__(
    self,
    tokens: Int[Array, "R T"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "R T D"]:
    """Encodes packed rows of tokens.

    Args:
      tokens: Token ids, int32 [R, T].
      segments: Slot of each token, 1..S; 0 for padding. int32 [R, T].
      positions: Position of each token in its text, from 0, int32 [R, T].
      key: Random key of the dropout; None for a deterministic run. An encoder without dropout ignores it.

    Returns:
      Hidden states [R, T, D] in `stream_dtype`. Those of padding have no meaning.
    """
    return self.encode(self.embed_tokens(tokens), segments, positions, key)

  def embed_tokens(self, tokens: Int[Array, "R T"]) -> Float[Array, "R T D"]:
    """Returns the word vectors [R, T, D] of tokens [R, T]. Early fusion replaces those of images."""
    return self.word_embedding[...][tokens].astype(self.stream_dtype)

  @property
  def stream_dtype(self) -> str:
    """Dtype of the hidden states between the layers."""
    return self.residual_dtype or self.dtype

  @abc.abstractmethod
  def encode(
    self,
    x: Float[Array, "*chunks R T D"],
    segments: Int[Array, "*chunks R T"],
    positions: Int[Array, "*chunks R T"],
    key: Key[Array, ""] | None = None,
    filled: Bool[Array, "*chunks"] | None = None,
  ) -> Float[Array, "*chunks R T D"]:
    """Encodes rows of word vectors.

    Args:
      x: Word vectors [R, T, D]; with `filled` those of several chunks, [chunks, R, T, D]. The other arguments and the
        result then have a dimension of chunks as well.
      segments: As in `__call__`.
      positions: As in `__call__`.
      key: As in `__call__`.
      filled: Which chunks have any text. Each layer then runs over one chunk after another, so that the backward pass
        needs the activations of one chunk only; see `transformer.scan_layers`. None for rows without chunks.
    """

  @abc.abstractmethod
  def encode_layers(
    self,
    x: Float[Array, "R T D"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "layers R T D"]:
    """Returns the input of the first layer and the output of every layer, [num_layers + 1, R, T, D].

    A norm after the last layer is not applied. The arguments are those of `encode`.
    """
