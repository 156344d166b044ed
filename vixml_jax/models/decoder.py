"""Decoder language models (Qwen2.5, Qwen3, Llama 3) as encoders of packed rows of texts."""

from collections.abc import Callable
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from vixml_jax.models import layers
from vixml_jax.typing import Array, Float, Int, Key


class Decoder(nnx.Module):
  """Pre-norm transformer with rotary positions, grouped heads and a gated feed-forward part; no output head.

  Input rows are packed: several texts stand in a row, told apart by `segments`; `positions` restart at 0 in each of
  them. A text's output does not depend on what shares its row.

  Args:
    vocab_size: number of word pieces.
    num_layers: depth.
    embed_dim: D.
    num_heads: heads of the queries.
    num_kv_heads: heads of keys and values, a divisor of `num_heads`.
    head_dim: width of a head, even.
    mlp_dim: width of the feed-forward part.
    rope_theta: base of the rotary frequencies.
    rope_scaling: None, or Llama 3's stretching of the slow frequencies: `(factor, low_freq_factor, high_freq_factor,
      original_max_position)`.
    norm_eps: added to the mean square in every norm.
    qkv_bias: whether queries, keys and values have biases (Qwen2.5).
    qk_norm: whether the heads of queries and keys are normalized before they are rotated (Qwen3).
    bidirectional: a token sees its whole text instead of what stands before it.
    lora_rank: of the adapters of all seven projections; 0 for none.
    lora_alpha: strength of the adapters, see `layers.lora_scale`.
    param_dtype: of all parameters but the adapters, which are f32; "bfloat16" where they are frozen.
    dtype: of the computation; norms, rotations and softmax are f32.
    remat: recompute the layers' activations in the backward pass.
    rngs: source of the initial values (normal, standard deviation 0.02).

  Raises:
    ValueError: heads do not divide, or a head is of odd width.

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
    dtype: str = "float32",
    remat: bool = False,
    *,
    rngs: nnx.Rngs,
  ):
    if num_heads % num_kv_heads or head_dim % 2:
      raise ValueError(
        f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}, and head_dim {head_dim} even"
      )
    self.embed_dim = embed_dim
    self.head_dim = head_dim
    self.rope_theta = rope_theta
    self.rope_scaling = rope_scaling
    self.bidirectional = bidirectional
    self.dtype = dtype
    self.remat = remat
    table = layers.normal_init(rngs.params(), (vocab_size, embed_dim), jnp.dtype(param_dtype))
    self.word_embedding = nnx.Param(table, axes=("vocab", "embed"))
    norm = functools.partial(layers.RMSNorm, epsilon=norm_eps, param_dtype=param_dtype)

    def make_layer(layer_rngs: nnx.Rngs) -> DecoderLayer:
      linear = functools.partial(
        layers.Linear, dtype=dtype, param_dtype=param_dtype, lora_rank=lora_rank, lora_alpha=lora_alpha, rngs=layer_rngs
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
          linear=linear,
          norm=norm,
        ),
        embed_dim,
        mlp_dim,
        linear=linear,
        norm=norm,
      )

    self.layers = layers.stack_layers(make_layer, num_layers, rngs)
    self.final_norm = norm(embed_dim)

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
      positions: int32 [R, T], from 0 in each text, in the order of the row.
      key: taken so that all encoders are called alike; there is no dropout here.

    Returns:
      Hidden states [R, T, D] in `dtype`, after the final norm; those of padding have no meaning.
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
    """Runs the decoder over embedded rows [R, T, D]; arguments as in `__call__`."""
    del key
    return self.final_norm(self._run(x, segments, positions, return_layers=False)[0])

  def encode_layers(
    self, x: Float[Array, "R T D"], segments: Int[Array, "R T"], positions: Int[Array, "R T"]
  ) -> Float[Array, "layers R T D"]:
    """The input and every layer's output, [num_layers + 1, R, T, D]; the final norm is not applied."""
    _, outputs = self._run(x, segments, positions, return_layers=True)
    return jnp.concatenate([x.astype(self.dtype)[None], outputs])

  def _run(self, x, segments, positions, return_layers):
    angles = positions[..., None] * rotary_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # Once for all layers.

    def apply(layer, hidden, _):
      return layer(hidden, segments, cos, sin)

    return layers.scan_layers(self.layers, x.astype(self.dtype), apply, remat=self.remat, return_layers=return_layers)


class DecoderLayer(nnx.Module):
  """Transformer layer with the norms before attention and feed-forward part, as in Llama.

  Args:
    attention: the layer's attention.
    embed_dim: D.
    mlp_dim: width of the feed-forward part.
    linear: makes a `layers.Linear`, given inputs, outputs and `bias`.
    norm: makes a `layers.RMSNorm`, given the size.
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
    """[R, T, D] -> [R, T, D]; the other arguments as in `GroupedAttention`."""
    x = x + self.attention(self.attention_norm(x), segments, cos, sin)
    y = self.mlp_norm(x)
    return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class GroupedAttention(nnx.Module):
  """Self-attention within segments, with rotary positions and fewer heads of keys and values than of queries.

  Args:
    embed_dim: D.
    num_heads: heads of the queries.
    num_kv_heads: heads of keys and values.
    head_dim: width of a head.
    qkv_bias: whether queries, keys and values have biases.
    qk_norm: whether the heads of queries and keys are normalized.
    causal: a token sees nothing that stands after it.
    linear: makes a `layers.Linear`, given inputs, outputs and `bias`.
    norm: makes a `layers.RMSNorm`, given the size and the name of the axis.
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
    linear: Callable[..., layers.Linear],
    norm: Callable[..., layers.RMSNorm],
  ):
    self.causal = causal
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
    """Attention of packed rows.

    Args:
      x: [R, T, D].
      segments: int32 [R, T], 0 for padding.
      cos: f32 [R, T, head_dim / 2], of the angles by which the tokens are rotated.
      sin: f32 [R, T, head_dim / 2].

    Returns:
      [R, T, D].
    """
    query, key, value = self.query(x), self.key(x), self.value(x)
    if self.query_norm is not None and self.key_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return self.output(layers.segment_attention(query, key, value, segments, causal=self.causal))


def rotary_frequencies(
  head_dim: int, theta: float, scaling: tuple[float, float, float, int] | None = None
) -> np.ndarray:
  """Angles, in radians a position, by which the pairs of a head are rotated.

  Args:
    head_dim: width of a head.
    theta: base; pair i turns by theta^(-2 i / head_dim).
    scaling: as in `Decoder`: pairs that turn fewer than `low_freq_factor` times over `original_max_position` turn
      `factor` times slower, those that turn more than `high_freq_factor` times stay, others lie between.

  Returns:
    f32 [head_dim / 2].

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
  """Rotates the pairs (i, i + head_dim / 2) of every head, in f32; `x` in its own dtype.

  Published checkpoints in the layout of Hugging Face pair the halves so; RoFormer pairs neighbors.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
