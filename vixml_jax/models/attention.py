"""Scaled dot-product attention within the segments of packed rows, and the multi-head attention layer.

Attention has several implementations. Each refuses with a `ValueError` what it cannot do. "auto" takes the fastest
that does not refuse; the reference never does.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vixml_jax import sharding
from vixml_jax.models import attention_cudnn, attention_reference, attention_splash, layers
from vixml_jax.models.attention_call import AUTO, CUDNN, IMPLEMENTATIONS, REFERENCE, SPLASH, AttentionCall
from vixml_jax.typing import Array, Float, Int, Key


class _Fused(NamedTuple):
  """A fused implementation: `check` raises a ValueError for an `AttentionCall` that `attend` cannot compute."""

  check: Callable[[AttentionCall], None]
  attend: Callable[..., Array]


_FUSED = {
  SPLASH: _Fused(attention_splash.check, attention_splash.attend),
  CUDNN: _Fused(attention_cudnn.check, attention_cudnn.attend),
}
# Platform -> what "auto" tries before the reference. Splash attention gains nothing on rows of 128 tokens, since it
# stores a statistic of each token 128 times, which is as much as the scores (docs/performance.md, "Attention").
_PREFERRED = {"gpu": (CUDNN,)}


def choose(name: str, call: AttentionCall) -> str:
  """Returns the implementation that computes a call: the named one, or for "auto" the first that supports it.

  Args:
    name: One of `attention_call.IMPLEMENTATIONS`.
    call: The call.

  Raises:
    ValueError: If the name is unknown, or the named implementation does not support the call.
  """
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"attention {name!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
  if name == AUTO:
    return next((fused for fused in _PREFERRED.get(call.platform, ()) if refusal(fused, call) is None), REFERENCE)
  reason = refusal(name, call)
  if reason is not None:
    raise ValueError(f"attention {name!r}: {reason}")
  return name


def refusal(name: str, call: AttentionCall) -> str | None:
  """Returns why an implementation cannot compute a call; None if it can."""
  if name != REFERENCE:
    try:
      _FUSED[name].check(call)
    except ValueError as error:
      return str(error)
  return None


def segment_attention(
  query: Float[Array, "R Q H head_dim"],
  key: Float[Array, "R T G head_dim"],
  value: Float[Array, "R T G head_dim"],
  segments: Int[Array, "R T"] | None,
  dropout_rate: float = 0.0,
  dropout_key: Key[Array, ""] | None = None,
  causal: bool = False,
  reach: Int[Array, ""] | None = None,
  implementation: str = REFERENCE,
  query_segments: Int[Array, "R Q"] | None = None,
) -> Float[Array, "R Q H head_dim"]:
  """Computes scaled dot-product attention in which each token attends to the tokens of its own segment only.

  Padding (segment 0) attends to padding, so that its rows stay finite. No text attends to padding.

  Args:
    query: Queries [R, Q, H, head_dim] with H heads. Q must equal T if `segments` is given without `query_segments`.
    key: Keys [R, T, G, head_dim]. Each of the G heads serves H / G adjacent heads of the queries.
    value: Values [R, T, G, head_dim].
    segments: Slot of each token, int32 [R, T]; 0 for padding. None lets every token attend to its whole row.
    dropout_rate: Dropout rate of the attention probabilities.
    dropout_key: Random key of the dropout; None for no dropout.
    causal: Whether a token attends only to itself and to earlier tokens of its row. Requires Q = T.
    reach: A token attends only to tokens of its row that are less than this many positions away. None for no bound.
      Requires Q = T.
    implementation: One of `attention_call.IMPLEMENTATIONS`; see `choose`. They differ by rounding.
    query_segments: Slot of each query, int32 [R, Q], where queries are not the tokens themselves; only the reference
      has them. A query whose slot no token has attends to all tokens of its row.

  Returns:
    [R, Q, H, head_dim] in the dtype of `value`. The softmax is computed in float32.

  Raises:
    ValueError: As in `choose`.
  """
  dropout = dropout_rate > 0 and dropout_key is not None
  chosen = choose(implementation, AttentionCall.of(query, key, segments is not None, dropout, reach is not None))
  if chosen == REFERENCE:
    return attention_reference.attend(
      query, key, value, segments, dropout_rate, dropout_key, causal, query_segments, reach
    )
  if query_segments is not None:
    raise ValueError(f"attention {chosen!r}: only the reference has segments of queries")
  heads, kv_heads = (("row", "position", name, "head_dim") for name in ("heads", "kv_heads"))
  # The kernels are custom calls, which XLA cannot divide among devices. Rows and heads do not depend on each other.
  attend = functools.partial(_FUSED[chosen].attend, causal=causal)
  return sharding.on_each_device(attend, (heads, kv_heads, kv_heads, ("row", "position")), heads)(
    query, key, value, segments
  )


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
    implementation: As in `segment_attention`, for attention within a row.
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
    implementation: str = REFERENCE,
    rngs: nnx.Rngs,
  ):
    if embed_dim % num_heads:
      raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
    self.dropout = dropout
    self.implementation = implementation
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
    mixed = segment_attention(query, keys, value, segments, self.dropout, key, implementation=self.implementation)
    return self.output(checkpoint_name(mixed, "attention"))

  def cross(
    self,
    x: Float[Array, "R Q D"],
    context: Float[Array, "R T D"],
    x_segments: Int[Array, "R Q"] | None = None,
    segments: Int[Array, "R T"] | None = None,
  ) -> Float[Array, "R Q D"]:
    """Computes attention of Q vectors to the T vectors of the same row, without dropout.

    Args:
      x: Vectors that attend.
      context: Vectors that they attend to.
      x_segments: Slot of each vector of x; it attends to the vectors of its slot only, and there must be some. None for
        attention to the whole row.
      segments: Slot of each vector of the context; None together with `x_segments`.
    """
    mixed = segment_attention(
      self.query(x), self.key(context), self.value(context), segments, query_segments=x_segments
    )
    return self.output(mixed)
