"""Decoder language models (Qwen2.5, Qwen3, Llama 3) as encoders of packed rows of texts."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from vixml_jax.models import layers
from vixml_jax.models.attention import name_projections, segment_attention
from vixml_jax.models.attention_call import AUTO
from vixml_jax.models.text_encoder import TextEncoder
from vixml_jax.models.transformer import check_saved, scan_layers, stack_layers
from vixml_jax.typing import Array, Bool, Float, Int, Key


class Decoder(TextEncoder):
  """Pre-norm transformer with rotary positions, grouped-query attention and a gated feed-forward network.

  There is no output head and no dropout.

  Args:
    vocab_size: Number of word pieces.
    num_layers: Number of layers.
    embed_dim: D.
    num_heads: Number of heads of the queries.
    num_kv_heads: Number of heads of the keys and values, a divisor of `num_heads`.
    head_dim: Width of a head; must be even.
    mlp_dim: Width of the feed-forward networks.
    rope_theta: Base of the rotary frequencies.
    rope_scaling: None, or the parameters with which Llama 3 lowers the slow frequencies: `(factor, low_freq_factor,
      high_freq_factor, original_max_position)`.
    norm_eps: Added to the mean square in every norm.
    qkv_bias: Whether queries, keys and values have biases (Qwen2.5).
    qk_norm: Whether each head of the queries and keys is normalized before it is rotated (Qwen3).
    bidirectional: Whether a token attends to its whole text instead of only to itself and earlier tokens.
    lora_rank: Rank of the adapters of all seven projections; 0 for no adapters.
    lora_alpha: Strength of the adapters; see `lora.lora_scale`.
    param_dtype: Dtype of all parameters except the adapters, which are float32. "bfloat16" suits frozen parameters.
    base_dtype: Dtype of the frozen kernels of all seven projections, "int8" or "float8_e4m3fn", with a float32 scale
      for each output channel; see `quantized.quantized_product`. "" for kernels in `param_dtype`. Requires adapters.
    dtype: Dtype of the computation. Norms, rotations and softmax are float32.
    residual_dtype: Dtype of the residual stream and of what the norms return; "" for `dtype`.
    remat: Whether to recompute the activations of each layer in the backward pass.
    remat_saved: Names (`transformer.SAVED_NAMES`) of activations that `remat` stores instead.
    attention: Implementation of the attention; see `attention.segment_attention`.
    rngs: Source of the initial values (normal, standard deviation 0.02).

  Raises:
    ValueError: If `num_heads` is not a multiple of `num_kv_heads`, `head_dim` is odd, or `base_dtype` is given without
      adapters.

  Reference: Qwen2.5 (arXiv 2412.15115), section 2; Qwen3 (arXiv 2505.09388), section 2; Llama 3 (arXiv 2407.21783),
  section 3.2.
  """

  def __init__(
    self,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    rope_theta: float,
    rope_scaling: tuple[float, float, float, int] | None = None,
    norm_eps: float = 1e-6,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    bidirectional: bool = False,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    param_dtype: str = "float32",
    base_dtype: str = "",
    dtype: str = "float32",
    residual_dtype: str = "",
    remat: bool = False,
    remat_saved: tuple[str, ...] = (),
    attention: str = AUTO,
    *,
    rngs: nnx.Rngs,
  ):
    if num_heads % num_kv_heads or head_dim % 2:
      raise ValueError(
        f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}, and head_dim {head_dim} must be even"
      )
    if base_dtype and not lora_rank:
      raise ValueError(f"base_dtype {base_dtype!r}: needs adapters, since quantized kernels cannot be trained")
    self.embed_dim = embed_dim
    self.head_dim = head_dim
    self.rope_theta = rope_theta
    self.rope_scaling = rope_scaling
    self.bidirectional = bidirectional
    self.dtype = dtype
    self.residual_dtype = residual_dtype
    self.remat = remat
    self.remat_saved = check_saved(remat_saved)
    table = layers.normal_init(rngs.params(), (vocab_size, embed_dim), jnp.dtype(param_dtype))
    self.word_embedding = nnx.Param(table, axes=("vocab", "embed"))
    norm = functools.partial(layers.RMSNorm, epsilon=norm_eps, param_dtype=param_dtype)

    def make_layer(layer_rngs: nnx.Rngs) -> DecoderLayer:
      linear = functools.partial(
        layers.Linear,
        dtype=dtype,
        param_dtype=param_dtype,
        base_dtype=base_dtype,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        rngs=layer_rngs,
      )
      return DecoderLayer(
        GroupedAttention(
          embed_dim,
          num_heads,
          num_kv_heads,
          head_dim,
          qkv_bias=qkv_bias,
          qk_norm=qk_norm,
          causal=not bidirectional,
          implementation=attention,
          linear=linear,
          norm=norm,
        ),
        embed_dim,
        mlp_dim,
        linear=linear,
        norm=norm,
      )

    self.layers = stack_layers(make_layer, num_layers, rngs)
    self.final_norm = norm(embed_dim)

  def encode(
    self,
    x: Float[Array, "*chunks R T D"],
    segments: Int[Array, "*chunks R T"],
    positions: Int[Array, "*chunks R T"],
    key: Key[Array, ""] | None = None,
    filled: Bool[Array, "*chunks"] | None = None,
  ) -> Float[Array, "*chunks R T D"]:
    """Encodes rows of word vectors, including the final norm; see `TextEncoder.encode`."""
    del key
    return self.final_norm(self._run(x, segments, positions, filled=filled)[0])

  def encode_layers(
    self,
    x: Float[Array, "R T D"],
    segments: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "layers R T D"]:
    """Returns the input and the output of every layer; see `TextEncoder.encode_layers`."""
    del key
    _, outputs = self._run(x, segments, positions, return_layers=True)
    return jnp.concatenate([x.astype(self.stream_dtype)[None], outputs])

  def _run(
    self, x: Array, segments: Array, positions: Array, *, return_layers: bool = False, filled: Array | None = None
  ) -> tuple[Array, Any]:
    angles = positions[..., None] * rotary_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # Computed once, for all layers.

    def apply(layer: DecoderLayer, hidden: Array, context: tuple[Array, Array, Array], _: Array | None) -> Array:
      return layer(hidden, *context)

    return scan_layers(
      self.layers,
      x.astype(self.stream_dtype),
      apply,
      (segments, cos, sin),
      remat=self.remat,
      saved=self.remat_saved,
      return_layers=return_layers,
      filled=filled,
    )


class DecoderLayer(nnx.Module):
  """Transformer layer that normalizes before the attention and before the feed-forward network, as in Llama.

  Args:
    attention: Attention of the layer.
    embed_dim: D.
    mlp_dim: Width of the feed-forward network.
    linear: Function that makes a `layers.Linear` from inputs, outputs and `bias`.
    norm: Function that makes a `layers.RMSNorm` from the size.
  """

  def __init__(
    self,
    attention: "GroupedAttention",
    embed_dim: int,
    mlp_dim: int,
    *,
    linear: Callable[..., layers.Linear],
    norm: Callable[..., layers.RMSNorm],
  ):
    self.attention_norm = norm(embed_dim)
    self.attention = attention
    self.mlp_norm = norm(embed_dim)
    self.gate = linear({"embed": embed_dim}, {"mlp": mlp_dim}, bias=False)
    self.up = linear({"embed": embed_dim}, {"mlp": mlp_dim}, bias=False)
    self.down = linear({"mlp": mlp_dim}, {"embed": embed_dim}, bias=False)

  def __call__(
    self,
    x: Float[Array, "R T D"],
    segments: Int[Array, "R T"],
    cos: Float[Array, "R T half"],
    sin: Float[Array, "R T half"],
  ) -> Float[Array, "R T D"]:
    """Applies the layer to [R, T, D]; the other arguments are those of `GroupedAttention`."""
    x = x + self.attention(self.attention_norm(x), segments, cos, sin).astype(x.dtype)
    y = self.mlp_norm(x)
    gate, up = checkpoint_name(self.gate(y), "gate"), checkpoint_name(self.up(y), "up")
    return x + self.down(jax.nn.silu(gate) * up).astype(x.dtype)


class GroupedAttention(nnx.Module):
  """Grouped-query attention within segments, with rotary positions.

  Args:
    embed_dim: D.
    num_heads: Number of heads of the queries.
    num_kv_heads: Number of heads of the keys and values.
    head_dim: Width of a head.
    qkv_bias: Whether queries, keys and values have biases.
    qk_norm: Whether each head of the queries and keys is normalized.
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
    causal: bool,
    implementation: str,
    linear: Callable[..., layers.Linear],
    norm: Callable[..., layers.RMSNorm],
  ):
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
  ) -> Float[Array, "R T D"]:
    """Computes the attention of packed rows.

    Args:
      x: Vectors [R, T, D].
      segments: Slot of each token, int32 [R, T]; 0 for padding.
      cos: Cosines of the angles by which the tokens are rotated, float32 [R, T, head_dim / 2].
      sin: Sines of the same angles.
    """
    query, key, value = name_projections(self.query(x), self.key(x), self.value(x))
    if self.query_norm is not None and self.key_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    mixed = segment_attention(query, key, value, segments, causal=self.causal, implementation=self.implementation)
    return self.output(checkpoint_name(mixed, "attention"))


def rotary_frequencies(
  head_dim: int, theta: float, scaling: tuple[float, float, float, int] | None = None
) -> np.ndarray:
  """Returns the angles, in radians per position, by which the pairs of a head are rotated.

  Args:
    head_dim: Width of a head.
    theta: Base; pair i turns by theta^(-2 i / head_dim) per position.
    scaling: `(factor, low_freq_factor, high_freq_factor, original_max_position)`. Pairs that turn less than
      `low_freq_factor` times over `original_max_position` positions are slowed down by `factor`. Pairs that turn more
      than `high_freq_factor` times are unchanged. The factor of the pairs between is interpolated. None for no scaling.

  Returns:
    float32 [head_dim / 2].

  Reference: RoFormer (arXiv 2104.09864), section 3.2.2; `apply_scaling` in Meta's llama-models for Llama 3.
  """
  frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling is not None:
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
