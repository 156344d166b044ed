"""A function over chunks of rows whose backward pass recomputes one chunk at a time, at constant memory."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import CustomVJPPrimal
import jax.numpy as jnp

from vixml_jax.typing import Array


def map_chunks(apply: Callable[[Any, Any], Array], constants: Any, chunks: Any, filled: Array) -> Array:
  """Returns `apply(constants, chunk)` of every filled chunk, stacked; zeros for empty chunks, at no cost.

  The activations of all chunks are kept for the backward pass, which a small encoder can afford.

  Args:
    apply: returns an array of the same shape for every chunk; it must not close over traced values.
    constants: what all chunks share, such as parameters.
    chunks: arrays whose leading dimension counts the chunks.
    filled: bool [chunks].
  """
  first = jax.tree.map(lambda x: x[0], chunks)
  if len(filled) == 1:  # A single chunk needs no loop and is never empty.
    return apply(constants, first)[None]
  empty = jax.eval_shape(apply, constants, first)

  def body(_: None, inputs: tuple[Array, Any]) -> tuple[None, Array]:
    is_filled, chunk = inputs
    return None, jax.lax.cond(
      is_filled, lambda chunk: apply(constants, chunk), lambda _: jnp.zeros(empty.shape, empty.dtype), chunk
    )

  return jax.lax.scan(body, None, (filled, chunks))[1]


def map_chunks_recomputed(apply: Callable[[Any, Any], Array], constants: Any, chunks: Any, filled: Array) -> Array:
  """Returns the same as `map_chunks`, but the backward pass runs the forward pass again, chunk by chunk.

  The derivative is written out because the derivative of `lax.cond` would keep everything that a branch needs,
  including the parameters, for every chunk. Gradients of constants are summed in one tree. Only arrays that are
  differentiated get gradients: frozen parameters cost none. A single chunk is not recomputed, since that would not
  lower the peak of memory.

  Reference: GradCache (arXiv 2101.06983), section 3.
  """
  if len(filled) == 1:
    return map_chunks(apply, constants, chunks, filled)

  @jax.custom_vjp
  def run(constants: Any, chunks: Any, filled: Array) -> Array:
    return map_chunks(apply, constants, chunks, filled)

  def forward(*arguments: Any) -> tuple[Array, tuple[Any, Any]]:
    """Keeps the arguments in two trees: those that are differentiated, and the others, with None in their places."""
    moving = jax.tree.map(lambda leaf: leaf.value if leaf.perturbed else None, arguments, is_leaf=_is_primal)
    fixed = jax.tree.map(lambda leaf: None if leaf.perturbed else leaf.value, arguments, is_leaf=_is_primal)
    return run(*_join(moving, fixed)), (moving, fixed)

  def backward(kept: tuple[Any, Any], cotangents: Array) -> tuple[Any, ...]:
    (moving_constants, moving_chunks, _), (fixed_constants, fixed_chunks, filled) = kept

    def body(gradients: Any, inputs: tuple[Array, Any, Any, Array]) -> tuple[Any, Any]:
      is_filled, moving_chunk, fixed_chunk, cotangent = inputs

      def run_moving(constants: Any, chunk: Any) -> Array:
        return apply(_join(constants, fixed_constants), _join(chunk, fixed_chunk))

      def add(gradients: Any) -> tuple[Any, Any]:
        _, pull_back = jax.vjp(run_moving, moving_constants, moving_chunk)
        of_constants, of_chunk = pull_back(cotangent)
        return jax.tree.map(jnp.add, gradients, of_constants), of_chunk

      def skip(gradients: Any) -> tuple[Any, Any]:
        return gradients, jax.tree.map(jnp.zeros_like, moving_chunk)

      return jax.lax.cond(is_filled, add, skip, gradients)

    zeros = jax.tree.map(jnp.zeros_like, moving_constants)
    inputs = (filled, moving_chunks, fixed_chunks, cotangents)
    return *jax.lax.scan(body, zeros, inputs, reverse=True), None

  run.defvjp(forward, backward, symbolic_zeros=True)
  return run(constants, chunks, filled)


def _is_primal(leaf: Any) -> bool:
  return isinstance(leaf, CustomVJPPrimal)


def _join(left: Any, right: Any) -> Any:
  """Returns a tree with the leaves of two trees, each of which has None where the other one has a leaf."""
  return jax.tree.map(lambda a, b: b if a is None else a, left, right, is_leaf=lambda leaf: leaf is None)
