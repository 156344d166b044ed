"""A function over chunks of rows whose backward pass can recompute one chunk at a time, at constant memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vixml_jax.typing import Array, Tree


def map_chunks(
  encode: Callable[[Tree, Any, Any], Array], params: Tree, constants: Any, chunks: Any, filled: Array
) -> Array:
  """`encode(params, constants, chunk)` of every filled chunk, stacked; zeros for the others, which cost nothing.

  All chunks' activations are kept for the backward pass: what a small encoder can afford.

  Args:
    encode: gives an array of the same shape for every chunk; takes no values from around it that are traced.
    params: what gradients are taken of.
    constants: whatever else it needs.
    chunks: arrays whose leading dimension counts the chunks.
    filled: bool [chunks].
  """
  first = jax.tree.map(lambda x: x[0], chunks)
  if len(filled) == 1:  # No loop: and what is alone holds something.
    return encode(params, constants, first)[None]
  empty = jax.eval_shape(encode, params, constants, first)

  def body(_, inputs):
    is_filled, chunk = inputs
    return None, jax.lax.cond(
      is_filled, lambda chunk: encode(params, constants, chunk), lambda _: jnp.zeros(empty.shape, empty.dtype), chunk
    )

  return jax.lax.scan(body, None, (filled, chunks))[1]


def map_chunks_recomputed(
  encode: Callable[[Tree, Any, Any], Array], params: Tree, constants: Any, chunks: Any, filled: Array
) -> Array:
  """As `map_chunks`, but the forward pass keeps nothing, and the backward pass runs it again, chunk by chunk.

  The derivative is written out, since that of `lax.cond` would keep all that a branch needs, the parameters among it,
  for every chunk. Gradients are added up in one tree like `params`; those of all else are zero. A single chunk is kept:
  running it again would not lower the peak.

  Reference: GradCache (arXiv 2101.06983), section 3.
  """
  if len(filled) == 1:
    return map_chunks(encode, params, constants, chunks, filled)

  @jax.custom_vjp
  def run(params, constants, chunks, filled):
    return map_chunks(encode, params, constants, chunks, filled)

  def forward(*arguments):
    return run(*arguments), arguments

  def backward(arguments, cotangents):
    params, constants, chunks, filled = arguments

    def body(gradients, inputs):
      is_filled, chunk, cotangent = inputs

      def add(gradients):
        _, pull_back = jax.vjp(lambda params: encode(params, constants, chunk), params)
        return jax.tree.map(jnp.add, gradients, pull_back(cotangent)[0])

      return jax.lax.cond(is_filled, add, lambda gradients: gradients, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    return *jax.lax.scan(body, zeros, (filled, chunks, cotangents), reverse=True)[:1], None, None, None

  run.defvjp(forward, backward)
  return run(params, constants, chunks, filled)
