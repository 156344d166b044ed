"""Attention within the segments of packed rows as plain products and a softmax, for every platform and shape."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vixml_jax import sharding
from vixml_jax.models import layers
from vixml_jax.typing import Array, Float, Int, Key

_MASKED = np.finfo(np.float32).min


def attend(
  query: Float[Array, "R Q H head_dim"],
  key: Float[Array, "R T G head_dim"],
  value: Float[Array, "R T G head_dim"],
  segments: Int[Array, "R T"] | None,
  dropout_rate: float = 0.0,
  dropout_key: Key[Array, ""] | None = None,
  causal: bool = False,
  query_segments: Int[Array, "R Q"] | None = None,
  reach: Int[Array, ""] | None = None,
) -> Float[Array, "R Q H head_dim"]:
  """Computes attention; the arguments and the result are those of `attention.segment_attention`."""
  rows, length, num_heads, head_dim = query.shape
  groups = key.shape[2]
  # The ellipsis in the einsums is the heads of a group. It is empty if every head has its own key, because a dimension
  # of size one would only cost copies.
  group = (num_heads // groups,) if num_heads > groups else ()
  grouped = (query * (1.0 / math.sqrt(head_dim))).reshape(rows, length, groups, *group, head_dim)
  logits = jnp.einsum("rqg...d,rkgd->rg...qk", grouped, key, preferred_element_type=jnp.float32)
  logits = logits.reshape(rows, num_heads, length, -1)
  if sharding.platform() == "gpu":  # Without it, XLA computes the gradient of the logits once for each of its products.
    logits = jax.lax.optimization_barrier(logits)
  bias = _bias(segments, causal, length, query_segments, reach)
  weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
  weights = layers.dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
  weights = weights.reshape(rows, groups, *group, length, -1)
  return jnp.einsum("rg...qk,rkgd->rqg...d", weights, value).reshape(query.shape)


def _bias(
  segments: Array | None, causal: bool, length: int, query_segments: Array | None = None, reach: Array | None = None
) -> Array | None:
  """Returns what is added to the logits, float32 [R or 1, 1, Q, T]; None if every token attends to its whole row.

  It is 0 where a token attends. Elsewhere it is so large that the sum is the same number for every logit, as if the
  logit was replaced. XLA moves what does not depend on the layer out of the loop over layers. A sum keeps the
  dimension of the heads out of the array that it moves; a `jnp.where` of the logits does not.
  """
  masks: list[Array] = []
  if segments is not None:
    of_queries = segments if query_segments is None else query_segments
    masks.append(of_queries[:, None, :, None] == segments[:, None, None, :])
  if causal:
    masks.append(jnp.tri(length, dtype=bool)[None, None])
  if reach is not None:  # Texts are contiguous in a row, so that distances in both are equal.
    places = np.arange(length)
    masks.append((np.abs(places[:, None] - places) < reach)[None, None])
  if not masks:
    return None
  return jnp.where(functools.reduce(jnp.logical_and, masks), np.float32(0), _MASKED)
