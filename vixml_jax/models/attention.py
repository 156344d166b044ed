"""Scaled dot-product attention within the segments of packed rows, and the multi-head attention layer."""

import math
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from vixml_jax.models import layers
from vixml_jax.typing import Array, Float, Int, Key


def segment_attention(
  query: Float[Array, "R Q H head_dim"],
  key: Float[Array, "R T G head_dim"],
  value: Float[Array, "R T G head_dim"],
  segments: Int[Array, "R T"] | None,
  dropout_rate: float = 0.0,
  dropout_key: Key[Array, ""] | None = None,
  causal: bool = False,
) -> Float[Array, "R Q H head_dim"]:
  """Computes scaled dot-product attention in which each token attends to the tokens of its own segment only.

  Padding (segment 0) attends to padding, so that its rows stay finite. No text attends to padding.

  Args:
    query: Queries [R, Q, H, head_dim] with H heads. Q must equal T if `segments` is given.
    key: Keys [R, T, G, head_dim]. Each of the G heads serves H / G adjacent heads of the queries.
    value: Values [R, T, G, head_dim].
    segments: Slot of each token, int32 [R, T]; 0 for padding. None lets every token attend to its whole row.
    dropout_rate: Dropout rate of the attention probabilities.
    dropout_key: Random key of the dropout; None for no dropout.
    causal: Whether a token attends only to itself and to earlier tokens of its row. Requires Q = T.

  Returns:
    [R, Q, H, head_dim] in the dtype of `value`. The softmax is computed in float32.
  """
  rows, length, num_heads, head_dim = query.shape
  groups = key.shape[2]
  # The ellipsis in the einsums is the heads of a group. It is empty if every head has its own key, because a dimension
  # of size one would only cost copies.
  group = (num_heads // groups,) if num_heads > groups else ()
  grouped = (query * (1.0 / math.sqrt(head_dim))).reshape(rows, length, groups, *group, head_dim)
  logits = jnp.einsum("rqg...d,rkgd->rg...qk", grouped, key, preferred_element_type=jnp.float32)
  logits = logits.reshape(rows, num_heads, length, -1)
  if segments is not None:
    same = segments[:, None, :, None] == segments[:, None, None, :]
    logits = jnp.where(same, logits, np.finfo(np.float32).min)
  if causal:
    earlier = np.tri(length, dtype=bool)
    logits = jnp.where(earlier, logits, np.finfo(np.float32).min)
  weights = jax.nn.softmax(logits, axis=-1)
  weights = layers.dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
  weights = weights.reshape(rows, groups, *group, length, -1)
  return jnp.einsum("rg...qk,rkgd->rqg...d", weights, value).reshape(query.shape)


def name_projections(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
  """Names queries, keys and values for `transformer.SAVED_NAMES`, and returns them unchanged."""
  return checkpoint_name(query, "query"), checkpoint_name(key, "key"), checkpoint_name(value, "value")


class Attention(nnx.Module):
  """Multi-head attention with biases; every head has its own keys and values.

  Args:
    embed_dim: D.
    num_heads: Number of heads H, a divisor of D.
    dropout: Dropout rate of the attention probabilities.
    dtype: Dtype of the computation.
    kernel_init: Initializer of the four kernels, which it sees as D x D matrices.
    output_init: Initializer of the kernel of the output, where it differs from that of queries, keys and values.
    rngs: Source of the initial values.
  """

  def __init__(
    self,
    embed_dim: int,
    num_heads: int,
    *,
    dropout: float = 0.0,
    dtype: str = "float32",
    kernel_init: layers.Initializer = layers.normal_init,
    output_init: layers.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    if embed_dim % num_heads:
      raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
    self.dropout = dropout
    embed = {"embed": embed_dim}
    heads = {"heads": num_heads, "head_dim": embed_dim // num_heads}
    options: dict[str, Any] = {"dtype": dtype, "kernel_init": kernel_init, "rngs": rngs}
    self.query = layers.Linear(embed, heads, **options)
    self.key = layers.Linear(embed, heads, **options)
    self.value = layers.Linear(embed, heads, **options)
    self.output = layers.Linear(heads, embed, **options | {"kernel_init": output_init or kernel_init})

  def __call__(
    self, x: Float[Array, "R T D"], segments: Int[Array, "R T"] | None, key: Key[Array, ""] | None = None
  ) -> Float[Array, "R T D"]:
    """Computes self-attention within segments.

    Args:
      x: Vectors [R, T, D].
      segments: As in `segment_attention`.
      key: Random key of the dropout; None for no dropout.
    """
    query, keys, value = name_projections(self.query(x), self.key(x), self.value(x))
    mixed = segment_attention(query, keys, value, segments, self.dropout, key)
    return self.output(checkpoint_name(mixed, "attention"))

  def cross(self, x: Float[Array, "R Q D"], context: Float[Array, "R T D"]) -> Float[Array, "R Q D"]:
    """Computes attention of Q vectors to the T vectors of the same row, without dropout."""
    mixed = segment_attention(self.query(x), self.key(context), self.value(context), None)
    return self.output(mixed)
