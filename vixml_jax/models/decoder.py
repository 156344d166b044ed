"""Decoder language models (Qwen2.5, Qwen3, Llama 3, Gemma 3) as encoders of packed rows of texts."""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from vixml_jax.models import layers
from vixml_jax.models.attention_call import AUTO, reach_of
from vixml_jax.models.rotary_attention import GroupedAttention, rotary_frequencies
from vixml_jax.models.text_encoder import TextEncoder
from vixml_jax.models.transformer import check_saved, scan_layers, stack_layers
from vixml_jax.typing import Array, Bool, Float, Int, Key

# Functions of the gate in the feed-forward network by their names in transformers.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


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
    rope_scaling: None, or what lowers the rotary frequencies: `(factor,)` for all of them (Gemma 3), or `(factor,
      low_freq_factor, high_freq_factor, original_max_position)` for the slow ones (Llama 3); see
      `rotary_attention.rotary_frequencies`.
    norm_eps: Added to the mean square in every norm.
    qkv_bias: Whether queries, keys and values have biases (Qwen2.5).
    qk_norm: Whether each head of the queries and keys is normalized before it is rotated (Qwen3, Gemma 3).
    zero_centered_norm: Whether norms multiply by 1 + scale instead of by scale (Gemma 3).
    output_norm: Whether the outputs of attention and feed-forward network are normalized before they are added to the
      residual stream (Gemma 3).
    activation: Function of the gate in the feed-forward network, a key of `ACTIVATIONS`.
    scale_embedding: Whether word vectors are multiplied by sqrt(D), rounded to the dtype of the embedding (Gemma 3).
    attention_scalar: Logits of the attention are divided by the root of this number; 0 for `head_dim`.
    global_every: Each `global_every`-th layer is global: its tokens attend to their whole text. The other layers are
      local (Gemma 3: 6). 1 for no local layers.
    window: Local layers: a token attends to the last `window` tokens of its text, itself included; with `bidirectional`
      to the tokens at a distance of at most `window // 2`. Only longer texts are affected.
    local_rope_theta: Local layers: base of the rotary frequencies, which are not scaled.
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
    ValueError: If `num_heads` is not a multiple of `num_kv_heads`, `head_dim` is odd, `base_dtype` is given without
      adapters, or local layers have no window.

  Reference: Qwen2.5 (arXiv 2412.15115), section 2; Qwen3 (arXiv 2505.09388), section 2; Llama 3 (arXiv 2407.21783),
  section 3.2; Gemma 3 (arXiv 2503.19786), section 2.
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
    rope_scaling: tuple[float] | tuple[float, float, float, int] | None = None,
    norm_eps: float = 1e-6,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    zero_centered_norm: bool = False,
    output_norm: bool = False,
    activation: str = "silu",
    scale_embedding: bool = False,
    attention_scalar: int = 0,
    global_every: int = 1,
    window: int = 0,
    local_rope_theta: float = 1e4,
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
    if global_every > 1 and not window:
      raise ValueError(f"global_every {global_every}: local layers need a window")
    self.num_layers = num_layers
    self.embed_dim = embed_dim
    self.head_dim = head_dim
    self.rope_theta = rope_theta
    self.rope_scaling = rope_scaling
    self.scale_embedding = scale_embedding
    self.global_every = global_every
    self.window = window
    self.local_rope_theta = local_rope_theta
    self.bidirectional = bidirectional
    self.dtype = dtype
    self.residual_dtype = residual_dtype
    self.remat = remat
    self.remat_saved = check_saved(remat_saved)
    table = layers.normal_init(rngs.params(), (vocab_size, embed_dim), jnp.dtype(param_dtype))
    self.word_embedding = nnx.Param(table, axes=("vocab", "embed"))
    norm = functools.partial(
      layers.RMSNorm, epsilon=norm_eps, zero_centered=zero_centered_norm, param_dtype=param_dtype
    )

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
          logits_scale=math.sqrt(head_dim / (attention_scalar or head_dim)),
          causal=not bidirectional,
          implementation=attention,
          linear=linear,
          norm=norm,
        ),
        embed_dim,
        mlp_dim,
        activation=activation,
        output_norm=output_norm,
        linear=linear,
        norm=norm,
      )

    self.layers = stack_layers(make_layer, num_layers, rngs)
    self.final_norm = norm(embed_dim)

  def embed_tokens(self, tokens: Int[Array, "R T"]) -> Float[Array, "R T D"]:
    """Returns the word vectors [R, T, D] of tokens [R, T]; see `TextEncoder.embed_tokens`."""
    if not self.scale_embedding:
      return super().embed_tokens(tokens)
    x = self.word_embedding[...][tokens]
    return (x * embedding_scale(self.embed_dim, x.dtype)).astype(self.stream_dtype)

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
    frequencies = [rotary_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)]
    is_local, reach, length = None, 0, x.shape[-2]
    if self.global_every > 1:
      frequencies.append(rotary_frequencies(self.head_dim, self.local_rope_theta))
      is_local = jnp.arange(1, self.num_layers + 1) % self.global_every != 0
      reach = reach_of(self.window, causal=not self.bidirectional)
    angles = [positions[..., None] * of_kind for of_kind in frequencies]
    rotations = tuple((jnp.cos(angle), jnp.sin(angle)) for angle in angles)  # Computed once, for all layers.

    def apply(layer: DecoderLayer, hidden: Array, context: Any, _: Array | None, is_local: Array | None) -> Array:
      segments, rotations = context
      if is_local is None:
        return layer(hidden, segments, *rotations[0])
      cos, sin = (jnp.where(is_local, local, whole) for whole, local in zip(*rotations, strict=True))
      # No token of a row is as far from another one as the row is long.
      bound = jnp.where(is_local, reach, length) if length > reach else None
      return layer(hidden, segments, cos, sin, bound)

    return scan_layers(
      self.layers,
      x.astype(self.stream_dtype),
      apply,
      (segments, rotations),
      by_layer=is_local,
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
    activation: Function of the gate, a key of `ACTIVATIONS`.
    output_norm: Whether the outputs of attention and feed-forward network are normalized too, as in Gemma.
    linear: Function that makes a `layers.Linear` from inputs, outputs and `bias`.
    norm: Function that makes a `layers.RMSNorm` from the size.
  """

  def __init__(
    self,
    attention: GroupedAttention,
    embed_dim: int,
    mlp_dim: int,
    *,
    activation: str,
    output_norm: bool,
    linear: Callable[..., layers.Linear],
    norm: Callable[..., layers.RMSNorm],
  ):
    self.activation = activation
    self.attention_norm = norm(embed_dim)
    self.attention = attention
    self.attention_output_norm = norm(embed_dim) if output_norm else None
    self.mlp_norm = norm(embed_dim)
    self.mlp_output_norm = norm(embed_dim) if output_norm else None
    self.gate = linear({"embed": embed_dim}, {"mlp": mlp_dim}, bias=False)
    self.up = linear({"embed": embed_dim}, {"mlp": mlp_dim}, bias=False)
    self.down = linear({"mlp": mlp_dim}, {"embed": embed_dim}, bias=False)

  def __call__(
    self,
    x: Float[Array, "R T D"],
    segments: Int[Array, "R T"],
    cos: Float[Array, "R T half"],
    sin: Float[Array, "R T half"],
    reach: Int[Array, ""] | None = None,
  ) -> Float[Array, "R T D"]:
    """Applies the layer to [R, T, D]; the other arguments are those of `GroupedAttention`."""
    y = self.attention(self.attention_norm(x), segments, cos, sin, reach).astype(x.dtype)
    x = x + (y if self.attention_output_norm is None else self.attention_output_norm(y))
    y = self.mlp_norm(x)
    gate, up = checkpoint_name(self.gate(y), "gate"), checkpoint_name(self.up(y), "up")
    y = self.down(ACTIVATIONS[self.activation](gate) * up).astype(x.dtype)
    return x + (y if self.mlp_output_norm is None else self.mlp_output_norm(y))


def embedding_scale(embed_dim: int, dtype: Any) -> np.ndarray:
  """Returns sqrt(D), rounded to the dtype of the word vectors as in transformers."""
  return np.asarray(math.sqrt(embed_dim), dtype)
