"""Basic layers: linear maps with optional LoRA adapters, norms, dropout, GELU and initializers."""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from vixml_jax.models.lora import lora_scale
from vixml_jax.models.quantized import quantize_kernel, quantized_product
from vixml_jax.typing import Array, Float, Key

Initializer = Callable[..., jax.Array]
normal_init = jax.nn.initializers.normal(0.02)
# The initial kernel of torch.nn.Linear: uniform within 1 / sqrt(fan_in).
fan_in_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# The initial kernels of queries, keys and values in torch.nn.MultiheadAttention, which draws the three as one matrix
# [3 D, D] with Xavier's bounds: uniform within sqrt(6 / (D + 3 D)).
stacked_xavier_uniform = jax.nn.initializers.variance_scaling(1 / 2, "fan_in", "uniform")


def split_key(key: Array | None, num: int) -> Any:
  """Returns `jax.random.split(key, num)`, or a list of `num` times None if there is no key."""
  return [None] * num if key is None else jax.random.split(key, num)


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
  """Sets each element to zero with probability `rate` and scales the others so that the mean is unchanged.

  The probability is rounded to a multiple of 1/256, and the scale is that of the rounded probability. One random byte
  per element costs a quarter of a random float, and random bits are most of dropout's cost on a CPU.

  Args:
    x: Array of any shape with at least one dimension.
    rate: Probability of zero, `0 <= rate < 1`.
    key: Random key of any implementation. None returns `x` unchanged.

  Raises:
    ValueError: If the rate is out of range, or is so small that it rounds to zero.
  """
  threshold = round(rate * 256)
  if not 0 <= rate < 1 or threshold == 256 or (threshold == 0 and rate > 0):
    raise ValueError(f"dropout rate {rate}: must be 0, or between 1/512 and 511/512")
  if key is None or threshold == 0:
    return x
  *leading, size = x.shape
  words = jax.random.bits(key, (*leading, -(-size // 4)), jnp.uint32)
  bits = lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, -1)[..., :size]
  return jnp.where(bits >= threshold, x * (256 / (256 - threshold)), jnp.zeros((), x.dtype))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns `x * Phi(x)`, the exact GELU; computed with erf, which is cheaper than erfc on every backend."""
  return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


class LayerNorm(nnx.Module):
  """Layer normalization over the last dimension, computed in float32 and returned in the dtype of the input.

  Args:
    size: Size of the last dimension.
    epsilon: Added to the variance.
  """

  def __init__(self, size: int, epsilon: float):
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones((size,)), axes=("embed",))
    self.bias = nnx.Param(jnp.zeros((size,)), axes=("embed",))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalizes over D."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Division by the root mean square of the last dimension, in float32, returned in the dtype of the input.

  Args:
    size: Size of the last dimension.
    epsilon: Added to the mean square.
    axis: Logical axis of the last dimension.
    zero_centered: Whether to multiply by 1 + scale, which starts at zero, instead of by a scale that starts at one.
    param_dtype: Dtype of the scale.
  """

  def __init__(
    self, size: int, epsilon: float, axis: str = "embed", *, zero_centered: bool = False, param_dtype: str = "float32"
  ):
    self.epsilon = epsilon
    self.zero_centered = zero_centered
    self.scale = nnx.Param((jnp.zeros if zero_centered else jnp.ones)((size,), param_dtype), axes=(axis,))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalizes over D."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    scale = self.scale[...].astype(jnp.float32)
    return (y * (1 + scale if self.zero_centered else scale)).astype(x.dtype)


class Linear(nnx.Module):
  """Affine map from the last dimensions of an array (`inputs`) to new ones (`outputs`).

  With a LoRA adapter the map is x W + b + alpha / sqrt(r) (x A) B. B is initialized with zeros, so that a new adapter
  does not change the map. A is initialized like the weight of torch.nn.Linear, as in PEFT.

  Args:
    inputs: Axis name and size of each dimension that is summed over.
    outputs: Axis name and size of each dimension of the result.
    bias: Whether to add b.
    uniform_bias: Whether b starts uniform within 1 / sqrt(fan_in), as in torch.nn.Linear, instead of zero.
    dtype: Dtype of the computation.
    param_dtype: Dtype of W and b. A and B are float32.
    base_dtype: Dtype of a frozen W that is quantized (a key of `quantized.LARGEST`), with a scale for each output in
      `kernel_scale`; "" for W in `param_dtype`. b, A and B are not quantized.
    kernel_init: Initializer of W. It is called with the kernel's shape as a matrix, so that fan-in and fan-out are
      right.
    lora_rank: r, the rank of the adapter; 0 for no adapter.
    lora_alpha: alpha; must be positive if there is an adapter.
    rngs: Source of the initial values.

  Reference: rank-stabilized LoRA (arXiv 2312.03732), section 3; `use_rslora` in PEFT.
  """

  def __init__(
    self,
    inputs: dict[str, int],
    outputs: dict[str, int],
    *,
    bias: bool = True,
    uniform_bias: bool = False,
    dtype: str = "float32",
    param_dtype: str = "float32",
    base_dtype: str = "",
    kernel_init: Initializer = normal_init,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.num_inputs = len(inputs)
    input_sizes, output_sizes = tuple(inputs.values()), tuple(outputs.values())
    matrix = (math.prod(input_sizes), math.prod(output_sizes))
    kernel = kernel_init(rngs.params(), matrix, jnp.dtype(param_dtype)).reshape(input_sizes + output_sizes)
    scale = None
    if base_dtype:
      kernel, scale = quantize_kernel(kernel, self.num_inputs, base_dtype)
    self.kernel = nnx.Param(kernel, axes=(*inputs, *outputs))
    self.kernel_scale = None if scale is None else nnx.Param(scale, axes=tuple(outputs))
    start = jnp.zeros(output_sizes, param_dtype)
    if uniform_bias:
      bound = 1 / math.sqrt(matrix[0])
      start = jax.random.uniform(rngs.params(), output_sizes, start.dtype, -bound, bound)
    self.bias = nnx.Param(start, axes=tuple(outputs)) if bias else None
    if not lora_rank:
      self.lora_a = self.lora_b = None
      return
    self.lora_scale = lora_scale(lora_rank, lora_alpha)
    lora_a = fan_in_uniform(rngs.params(), (matrix[0], lora_rank), jnp.float32)
    rank_a, rank_b = ("lora" if "embed" in sizes else "lora_alone" for sizes in (inputs, outputs))
    self.lora_a = nnx.Param(lora_a.reshape(*input_sizes, lora_rank), axes=(*inputs, rank_a))
    self.lora_b = nnx.Param(jnp.zeros((lora_rank, *output_sizes)), axes=(rank_b, *outputs))

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Maps [..., *inputs] to [..., *outputs]."""
    x = x.astype(self.dtype)
    if self.kernel_scale is None:
      y = jnp.tensordot(x, self.kernel[...].astype(self.dtype), axes=self.num_inputs)
    else:
      y = quantized_product(x, self.kernel[...], self.kernel_scale[...])  # float32, until all terms are added.
    if self.lora_a is not None and self.lora_b is not None:
      # The scale is applied to x A, which is narrower than the result.
      narrow = self.lora_scale * jnp.tensordot(x, self.lora_a[...].astype(self.dtype), axes=self.num_inputs)
      y = y + jnp.tensordot(narrow, self.lora_b[...].astype(self.dtype), axes=1)
    if self.bias is not None:
      y = y + self.bias[...].astype(self.dtype)
    return y.astype(self.dtype)
