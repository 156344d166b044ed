"""Attention within the segments of packed rows by cuDNN's fused kernels for NVIDIA GPUs.

The kernels read a bias of one number per pair of tokens of a row, which all heads and layers share. Logits and
probabilities never reach the GPU's memory.
"""

import re
from typing import Literal

import jax

from vixml_jax.models.attention_call import AttentionCall
from vixml_jax.typing import Array, Float, Int

_DTYPES = ("bfloat16", "float16")
_MAX_HEAD, _HEAD_MULTIPLE = 128, 8
_MIN_CAPABILITY = 8  # Ampere.


def check(call: AttentionCall) -> None:
  """Checks that cuDNN supports a call.

  Raises:
    ValueError: If it does not; the message says why.
  """
  if call.platform != "gpu":
    raise ValueError(f"it needs an NVIDIA GPU, and the platform is {call.platform}")
  call.check_packed()
  if call.dtype not in _DTYPES:
    raise ValueError(f"it computes in {' or '.join(_DTYPES)}, not in {call.dtype} (encoder.dtype)")
  if call.head_dim > _MAX_HEAD or call.head_dim % _HEAD_MULTIPLE:
    raise ValueError(
      f"the width of a head must be a multiple of {_HEAD_MULTIPLE} and at most {_MAX_HEAD}, not {call.head_dim}"
    )
  if call.length % 2:
    raise ValueError(f"rows must have an even number of tokens, not {call.length} (train.row_length)")
  if jax.default_backend() == "gpu":  # Otherwise the program is for a GPU that is absent, all of which are new enough.
    _check_capability(str(jax.local_devices()[0].compute_capability))


def _check_capability(capability: str) -> None:
  """Checks the compute capability of a GPU, such as "9.0"; that of an AMD GPU is no number."""
  found = re.fullmatch(r"(\d+)\.\d+", capability)
  if found is None or int(found[1]) < _MIN_CAPABILITY:
    raise ValueError(
      f"it needs an NVIDIA GPU of compute capability {_MIN_CAPABILITY}.0 (Ampere) or later; this one has {capability}"
    )


def attend(
  query: Float[Array, "R T H head_dim"],
  key: Float[Array, "R T G head_dim"],
  value: Float[Array, "R T G head_dim"],
  segments: Int[Array, "R T"],
  causal: bool,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "R T H head_dim"]:
  """Computes attention of the rows of one device; other arguments and the result are as in `segment_attention`.

  Args:
    implementation: That of `jax.nn.dot_product_attention`. "xla" computes the same without cuDNN, on any platform.
  """
  same = segments[:, None, :, None] == segments[:, None, None, :]
  return jax.nn.dot_product_attention(query, key, value, mask=same, is_causal=causal, implementation=implementation)
