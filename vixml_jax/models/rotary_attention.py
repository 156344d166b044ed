"""Grouped-query attention with rotary positions, and the frequencies of its rotation."""

from collections.abc import Callable

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from vixml_jax.models import layers
from vixml_jax.models.attention import name_projections, segment_attention
from vixml_jax.typing import Array, Float, Int


class GroupedAttention(nnx.Module):
  """Grouped-query attention within segments, with rotary positions.

  Args:
    embed_dim: D.
    num_heads: Number of heads of the queries.
    num_kv_heads: Number of heads of the keys and values.
    head_dim: Width of a head.
    qkv_bias: Whether queries, keys and values have biases.
    qk_norm: Whether each head of the queries and keys is normalized.
    logits_scale: Factor of the logits, besides 1 / sqrt(head_dim).
    causal: Whether a token attends only to itself and to earlier tokens.
    implementation: Implementation of the attention; see `attention.segment_attention`.
    linear: Function that makes a `layers.Linear` from inputs, outputs and `bias`.
    norm: Function that makes a `layers.RMSNorm` from the size and `axis`.

  Reference: GQA (arXiv 2305.13245); RoFormer (arXiv 2104.09864).
  """

  def __init__(
    self,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    qkv_bias: bool,
    qk_norm: bool,
    logits_scale: float,
    causal: bool,
    implementation: str,
    linear: Callable[..., layers.Linear],
    norm: Callable[..., layers.RMSNorm],
  ):
    self.logits_scale = logits_scale
    self.causal = causal
    self.implementation = implementation
    embed = {"embed": embed_dim}
    heads = {"heads": num_heads, "head_dim": head_dim}
    kv_heads = {"kv_heads": num_kv_heads, "head_dim": head_dim}
    self.query = linear(embed, heads, bias=qkv_bias)
    self.key = linear(embed, kv_heads, bias=qkv_bias)
    self.value = linear(embed, kv_heads, bias=qkv_bias)
    self.output = linear(heads, embed, bias=False)
    self.query_norm = norm(head_dim, axis="head_dim") if qk_norm else None
    self.key_norm = norm(head_dim, axis="head_dim") if qk_norm else None

  def __call__(
    self,
    x: Float[Array, "R T D"],
    segments: Int[Array, "R T"],
    cos: Float[Array, "R T half"],
    sin: Float[Array, "R T half"],
    reach: Int[Array, ""] | None = None,
  ) -> Float[Array, "R T D"]:
    """Computes the attention of packed rows.

    Args:
      x: Vectors [R, T, D].
      segments: Slot of each token, int32 [R, T]; 0 for padding.
      cos: Cosines of the angles by which the tokens are rotated, float32 [R, T, head_dim / 2].
      sin: Sines of the same angles.
      reach: As in `attention.segment_attention`.
    """
    query, key, value = name_projections(self.query(x), self.key(x), self.value(x))
    if self.query_norm is not None and self.key_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if self.logits_scale != 1:
      query = query * self.logits_scale
    mixed = segment_attention(
      query, key, value, segments, causal=self.causal, reach=reach, implementation=self.implementation
    )
    return self.output(checkpoint_name(mixed, "attention"))


def rotary_frequencies(
  head_dim: int, theta: float, scaling: tuple[float] | tuple[float, float, float, int] | None = None
) -> np.ndarray:
  """Returns the angles, in radians per position, by which the pairs of a head are rotated.

  Args:
    head_dim: Width of a head.
    theta: Base; pair i turns by theta^(-2 i / head_dim) per position.
    scaling: `(factor,)` slows down all pairs by `factor`. With `(factor, low_freq_factor, high_freq_factor,
      original_max_position)`, pairs that turn less than `low_freq_factor` times over `original_max_position` positions
      are slowed down by `factor`. Pairs that turn more than `high_freq_factor` times are unchanged. The factor of the
      pairs between is interpolated. None for no scaling.

  Returns:
    float32 [head_dim / 2].

  Reference: RoFormer (arXiv 2104.09864), section 3.2.2; position interpolation (arXiv 2306.15595), equation 4, for
  `(factor,)`; `apply_scaling` in Meta's llama-models for Llama 3.
  """
  frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling is not None and len(scaling) == 1:
    frequencies = frequencies / scaling[0]
  elif scaling is not None:
    factor, low, high, original_max_position = scaling
    turns = original_max_position * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    frequencies = frequencies * (kept + (1 - kept) / factor)
  return frequencies.astype(np.float32)


def rotate(
  x: Float[Array, "R T H head_dim"], cos: Float[Array, "R T half"], sin: Float[Array, "R T half"]
) -> Float[Array, "R T H head_dim"]:
  """Rotates the pairs (i, i + head_dim / 2) of every head in float32, and returns them in the dtype of `x`.

  RoFormer pairs adjacent elements. Checkpoints in the layout of Hugging Face pair the halves of a head instead.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
