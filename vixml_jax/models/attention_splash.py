"""Attention within the segments of packed rows by JAX's splash attention, a Pallas kernel for TPUs.

The kernel computes one row and one head at a time in the memory of the core. Logits and probabilities never reach HBM.
It is an experimental part of JAX (`jax.experimental.pallas.ops.tpu.splash_attention`), which is imported when it is
used.
"""

import math

import jax

from vixml_jax.models.attention_call import AttentionCall
from vixml_jax.typing import Array, Float, Int

_LANES = 128  # Width of a vector register: the kernel needs blocks of a multiple of it.
_MAX_BLOCK = 512
_DTYPES = ("bfloat16", "float32")
_HEAD_MULTIPLE = 32


def check(call: AttentionCall) -> None:
  """Checks that the kernel supports a call.

  Raises:
    ValueError: If it does not; the message says why.
  """
  if call.platform != "tpu":
    raise ValueError(f"it needs a TPU, and the platform is {call.platform}")
  call.check_packed()
  if call.dtype not in _DTYPES:
    raise ValueError(f"it computes in {' or '.join(_DTYPES)}, not in {call.dtype} (encoder.dtype)")
  if call.length % _LANES:
    raise ValueError(f"rows must be a multiple of {_LANES} tokens long, not {call.length} (train.row_length)")
  if call.head_dim % _HEAD_MULTIPLE:
    raise ValueError(f"the width of a head must be a multiple of {_HEAD_MULTIPLE}, not {call.head_dim}")


def attend(
  query: Float[Array, "R T H head_dim"],
  key: Float[Array, "R T G head_dim"],
  value: Float[Array, "R T G head_dim"],
  segments: Int[Array, "R T"],
  causal: bool,
  interpret: bool = False,
) -> Float[Array, "R T H head_dim"]:
  """Computes attention of the rows of one device; other arguments and the result are as in `segment_attention`.

  Args:
    interpret: Whether to run the kernel step by step on any platform, which is slow.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  _, length, num_heads, head_dim = query.shape
  block = max(size for size in range(_LANES, _MAX_BLOCK + 1, _LANES) if length % size == 0)
  mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
  attend_row = kernel.make_splash_mha(
    masks.MultiHeadMask([mask] * num_heads),
    # One kernel computes all gradients.
    block_sizes=kernel.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  # The kernel does not scale, and it wants the heads before the tokens.
  query = query * (1.0 / math.sqrt(head_dim))
  by_head = (x.swapaxes(1, 2) for x in (query, key, value))
  mixed = jax.vmap(attend_row)(*by_head, kernel.SegmentIds(segments, segments))
  return mixed.swapaxes(1, 2).astype(value.dtype)
