"""Rank-stabilized LoRA adapters: their scale, their separation from the base, and their merging into it.

The adapters themselves are part of `layers.Linear`.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

from jax import lax
import jax.numpy as jnp

from vixml_jax.models.quantized import dequantize_kernel
from vixml_jax.typing import Tree

_ADAPTERS = ("lora_a", "lora_b")


def lora_scale(rank: int, alpha: float) -> float:
  """Returns alpha / sqrt(rank), the factor of the product of an adapter's two matrices.

  >>> lora_scale(rank=256, alpha=256.0)
  16.0

  Raises:
    ValueError: If the rank or alpha is not positive.

  Reference: rank-stabilized LoRA (arXiv 2312.03732), section 3.
  """
  if rank <= 0 or alpha <= 0:
    raise ValueError(f"LoRA rank {rank} and alpha {alpha}: both must be positive")
  return alpha / math.sqrt(rank)


def split_lora(params: Tree) -> tuple[Tree, Tree]:
  """Splits a nested dict with the keys of a model's parameters into the base and the adapters.

  >>> split_lora({"up": {"kernel": 1, "lora_a": 2, "lora_b": 3}})
  ({'up': {'kernel': 1}}, {'up': {'lora_a': 2, 'lora_b': 3}})

  Returns:
    `(base, adapters)`: a nested dict without `lora_a` and `lora_b`, and one with only these.
    `parameters.join_params` is the inverse.
  """
  base: Tree = {}
  adapters: Tree = {}
  for name, value in params.items():
    if not isinstance(value, dict):
      (adapters if name in _ADAPTERS else base)[name] = value
      continue
    for tree, part in zip((base, adapters), split_lora(value), strict=True):
      if part:
        tree[name] = part
  return base, adapters


def merge_lora(params: Tree, scale: float) -> Tree:
  """Adds adapters to the kernels that they adapt, which gives the same map without adapters.

  Args:
    params: Nested dict of arrays, in which `lora_a` and `lora_b` are siblings of a `kernel`, and of its `kernel_scale`
      if it is quantized. Layers may be stacked.
    scale: Factor that `lora_scale` returns.

  Returns:
    The nested dict without adapters and without scales. Each kernel keeps its dtype, but a quantized one becomes
    float32. The sum is computed in float32.
  """
  merged: Tree = {
    name: merge_lora(value, scale) if isinstance(value, dict) else value for name, value in params.items()
  }
  if "lora_a" in merged:
    adapter = merged.pop("lora_a"), merged.pop("lora_b")
    merged["kernel"] = _merge_kernel(merged["kernel"], merged.pop("kernel_scale", None), *adapter, scale)
  return merged


def _merge_kernel(kernel: Any, kernel_scale: Any, lora_a: Any, lora_b: Any, scale: float) -> Any:
  def merge_one(matrices: tuple[Any, Any, Any, Any]) -> Any:
    kernel, kernel_scale, lora_a, lora_b = matrices
    if kernel_scale is not None:
      kernel = dequantize_kernel(kernel, kernel_scale)
    update = jnp.tensordot(lora_a, lora_b, axes=1, precision=lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)

  merge: Callable[[tuple[Any, Any, Any, Any]], Any] = merge_one
  # A kernel has the dimensions of its inputs and outputs; A and B together have these and the rank twice. All other
  # dimensions are stacked layers. Layers are merged one at a time: float32 products of all of them would not fit.
  for _ in range(lora_a.ndim + lora_b.ndim - kernel.ndim - 2):
    merge = functools.partial(lax.map, merge)
  return merge((kernel, kernel_scale, lora_a, lora_b))
