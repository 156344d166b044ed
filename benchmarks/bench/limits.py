"""Measures what the machine can do: the rate of matrix products in a dtype, and the bandwidth of its memory."""

from collections.abc import Callable
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.bench.harness import Cost, missing_packages

# Rows of the square matrices, and numbers of the copied array.
_MATRIX = {"tiny": 128, "cpu": 2048, "gpu": 8192}
_NUMBERS = {"tiny": 2**16, "cpu": 2**26, "gpu": 2**29}
_REPEATS = 5


class Limits:
  """The limits of this machine, measured when they are first needed.

  A limit is the best of several calls of JAX and of torch, on the GPU if there is one.

  Args:
    size: Size of the run, which the sizes of the measurements follow.
  """

  def __init__(self, size: str):
    self._size = size
    self.found: dict[str, float] = {}

  def rate(self, cost: Cost) -> float:
    """Returns FLOP/s of matrix products in the dtype of the cost, or bytes/s of the memory."""
    name = f"{cost.dtype} FLOP/s" if cost.kind == "flops" else "bytes/s"
    if name not in self.found:
      self.found[name] = self._products(cost.dtype) if cost.kind == "flops" else self._bandwidth()
    return self.found[name]

  def _products(self, dtype: str) -> float:
    rows = _MATRIX[self._size]
    product = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    matrix = jnp.full((rows, rows), 0.5, dtype)
    seconds = [_best(lambda: product(matrix, matrix).block_until_ready())]
    torch = _torch()
    if torch is not None:
      device = "cuda" if torch.cuda.is_available() else "cpu"
      theirs = torch.full((rows, rows), 0.5, dtype=getattr(torch, dtype), device=device)
      seconds.append(_best(lambda: _finished(torch, theirs @ theirs)))
    return 2.0 * rows**3 / min(seconds)

  def _bandwidth(self) -> float:
    numbers = jnp.zeros(_NUMBERS[self._size], jnp.float32)
    increment = jax.jit(lambda x: x + 1)
    seconds = [_best(lambda: increment(numbers).block_until_ready())]
    torch = _torch()
    if torch is not None:
      device = "cuda" if torch.cuda.is_available() else "cpu"
      source = torch.zeros(_NUMBERS[self._size], device=device)
      target = torch.empty_like(source)
      seconds.append(_best(lambda: _finished(torch, target.copy_(source))))
    return 2.0 * numbers.nbytes / min(seconds)


def _torch() -> Any:
  """Returns the module torch, or None where it is absent."""
  if missing_packages(["torch"]):
    return None
  import torch

  return torch


def _finished(torch: Any, result: Any) -> Any:
  if torch.cuda.is_available():
    torch.cuda.synchronize()
  return result


def _best(call: Callable[[], Any]) -> float:
  """Returns the seconds of the fastest of several calls, after one that compiles."""
  call()
  seconds = []
  for _ in range(_REPEATS):
    started = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - started)
  return min(seconds)
