"""Frozen kernels in int8 or float8: how they are quantized, and their product with float activations."""

import jax
from jax import lax
import jax.numpy as jnp

from vixml_jax.typing import Array, Float, Shaped

# Dtypes of a quantized kernel -> the largest magnitude that is used. int8 is symmetric, so -128 is not used.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def quantize(
  x: Float[Array, "..."], axes: tuple[int, ...], dtype: str
) -> tuple[Shaped[Array, "..."], Float[Array, "..."]]:
  """Returns values of few bits and the scale by which they are multiplied to give `x` approximately.

  The scale maps the largest magnitude along `axes` to the largest value of the dtype. The error of an element is at
  most half a scale in int8, and at most 1/16 of the element in float8 (E4M3 has three bits of mantissa), unless the
  element is below 2^-6 scales, where float8 is subnormal and the error is at most 2^-10 scales.

  >>> values, scale = quantize(jnp.asarray([[63.0, -254.0], [0.0, 0.0]]), (1,), "int8")
  >>> values.tolist(), scale.tolist()
  ([[32, -127], [0, 0]], [2.0, 1.0])

  Args:
    x: Array of any shape and any float dtype.
    axes: Axes whose elements share a scale.
    dtype: A key of `LARGEST`.

  Returns:
    `(values, scale)`: an array of `dtype` with the shape of `x`, and a float32 array without `axes`.

  Reference: LLM.int8() (arXiv 2208.07339), section 2.1, vector-wise absmax quantization; FP8 formats for deep learning
  (arXiv 2209.05433), section 3.
  """
  largest = LARGEST[dtype]
  x = x.astype(jnp.float32)
  magnitude = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  # Not `magnitude > 0`, so that NaN gives a scale of NaN instead of a finite result.
  scale = jnp.where(magnitude == 0, 1.0, magnitude / largest)
  # Rounding may put the quotient above the largest value, which float8 would convert to NaN.
  scaled = jnp.clip(x / scale, -largest, largest)
  values = jnp.round(scaled) if dtype == "int8" else scaled
  return values.astype(dtype), jnp.squeeze(scale, axes)


def quantize_kernel(
  kernel: Float[Array, "..."], num_inputs: int, dtype: str
) -> tuple[Shaped[Array, "..."], Float[Array, "..."]]:
  """Returns a kernel [*inputs, *outputs] as `quantize` does, with a scale [*outputs] for each output channel."""
  return quantize(kernel, tuple(range(num_inputs)), dtype)


def dequantize_kernel(values: Shaped[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns the float32 kernel [*inputs, *outputs] of quantized values with a scale [*outputs]."""
  return values.astype(jnp.float32) * scale


@jax.custom_vjp
def quantized_product(
  x: Float[Array, "..."], kernel: Shaped[Array, "..."], scale: Float[Array, "..."]
) -> Float[Array, "..."]:
  """Returns the product of activations and a frozen quantized kernel, as one product of its dtype.

  Forward, the activations are quantized with one scale for each token (row), in the dtype of the kernel. The product is
  multiplied by the scale of the token and that of the output channel. Products in int8 are summed in int32, which is
  exact, so that devices that share a product compute the same bits. Products in float8 are returned in bfloat16 if the
  activations are, which halves their traffic on GPUs and rounds far less than float8 does.

  Backward, the gradient of the activations is that of the product of the dequantized kernel and activations that are
  not rounded (a straight-through estimator). The kernel has no gradient. The kernel is dequantized to the dtype of the
  activations, and the gradient is not quantized. In E5M2, the product would be as fast as the forward pass, but E5M2
  has two bits of mantissa, and the gradients of all adapters below a layer pass through this product.

  Args:
    x: Activations [..., *inputs] in the dtype of the computation.
    kernel: Values [*inputs, *outputs] that `quantize_kernel` returned.
    scale: Their scale, float32 [*outputs].

  Returns:
    float32 [..., *outputs], so that what is added to it is not rounded twice.

  Reference: LLM.int8() (arXiv 2208.07339), section 2.1; FP8 formats for deep learning (arXiv 2209.05433), section 3.
  """
  return _forward(x, kernel, scale)[0]


def _forward(x: Array, kernel: Array, scale: Array) -> tuple[Array, tuple[Array, Array, Array]]:
  num_inputs = kernel.ndim - scale.ndim
  axes = tuple(range(x.ndim - num_inputs, x.ndim))
  values, x_scale = quantize(x, axes, kernel.dtype.name)
  if jnp.issubdtype(kernel.dtype, jnp.integer):
    result = jnp.int32
  else:
    result = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32
  contracted = (axes, tuple(range(num_inputs)))
  product = lax.dot_general(values, kernel, (contracted, ((), ())), preferred_element_type=result)
  x_scale = jnp.expand_dims(x_scale, tuple(range(x_scale.ndim, product.ndim)))
  # The empty array keeps the dtype of the activations.
  return product.astype(jnp.float32) * x_scale * scale, (kernel, scale, jnp.empty((0,), x.dtype))


def _backward(kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, None, None]:
  kernel, scale, like = kept
  gradient = gradient.astype(like.dtype)
  axes = tuple(range(gradient.ndim - scale.ndim, gradient.ndim))
  outputs = tuple(range(kernel.ndim - scale.ndim, kernel.ndim))
  dequantized = dequantize_kernel(kernel, scale).astype(like.dtype)
  return lax.dot_general(gradient, dequantized, ((axes, outputs), ((), ()))), None, None


quantized_product.defvjp(_forward, _backward)
