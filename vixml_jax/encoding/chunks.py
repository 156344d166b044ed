"""A function over chunks of rows whose backward pass recomputes one chunk at a time, at constant memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vixml_jax.typing import Array, Tree


def map_chunks(
  encode: Callable[[Tree, Any, Any], Array], params: Tree, constants: Any, chunks: Any, filled: Array
) -> Array:
  """Returns `encode(params, constants, chunk)` of every filled chunk, stacked; zeros for empty chunks, at no cost.

  The activations of all chunks are kept for the backward pass, which a small encoder can afford.

  Args:
    encode: returns an array of the same shape for every chunk; it must not close over traced values.
    params: what gradients are taken of.
    constants: further arguments of `encode`.
    chunks: arrays whose leading dimension counts the chunks.
    filled: bool [chunks].
  """
  first = jax.tree.map(lambda x: x[0], chunks)
  if len(filled) == 1:  # A single chunk needs no loop and is never empty.
    return encode(params, constants, first)[None]
  empty = jax.eval_shape(encode, params, constants, first)

  def body(_: None, inputs: tuple[Array, Any]) -> tuple[None, Array]:
    is_filled, chunk = inputs
    return None, jax.lax.cond(
      is_filled, lambda chunk: encode(params, constants, chunk), lambda _: jnp.zeros(empty.shape, empty.dtype), chunk
    )

  return jax.lax.scan(body, None, (filled, chunks))[1]


def map_chunks_recomputed(
  encode: Callable[[Tree, Any, Any], Array], params: Tree, constants: Any, chunks: Any, filled: Array
) -> Array:
  """Returns the same as `map_chunks`, but the backward pass runs the forward pass again, chunk by chunk.

  The derivative is written out because the derivative of `lax.cond` would keep everything that a branch needs,
  including the parameters, for every chunk. Gradients are summed in one tree like `params`; gradients of all other
  arguments are zero. A single chunk is not recomputed, since that would not lower the peak of memory.

  Reference: GradCache (arXiv 2101.06983), section 3.
  """
  if len(filled) == 1:
    return map_chunks(encode, params, constants, chunks, filled)

  @jax.custom_vjp
  def run(params: Tree, constants: Any, chunks: Any, filled: Array) -> Array:
    return map_chunks(encode, params, constants, chunks, filled)

  def forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return run(*arguments), arguments

  def backward(arguments: tuple[Any, ...], cotangents: Array) -> tuple[Any, ...]:
    params, constants, chunks, filled = arguments

    def body(gradients: Tree, inputs: tuple[Array, Any, Array]) -> tuple[Tree, None]:
      is_filled, chunk, cotangent = inputs

      def add(gradients: Tree) -> Tree:
        _, pull_back = jax.vjp(lambda params: encode(params, constants, chunk), params)
        return jax.tree.map(jnp.add, gradients, pull_back(cotangent)[0])

      return jax.lax.cond(is_filled, add, lambda gradients: gradients, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    return *jax.lax.scan(body, zeros, (filled, chunks, cotangents), reverse=True)[:1], None, None, None

  run.defvjp(forward, backward)
  return run(params, constants, chunks, filled)
