"""Pooling of packed rows: one vector per text of a row."""

from jax import lax
import jax.numpy as jnp

from vixml_jax.typing import Array, Float, Int


def pool_segments(
  hidden: Float[Array, "R T D"], segments: Int[Array, "R T"], num_segments: int
) -> Float[Array, "R S D"]:
  """Returns the mean hidden state of each segment, which is the sentence embedding before normalization.

  >>> hidden = jnp.asarray([[[1.0], [3.0], [5.0], [9.0]]])
  >>> pool_segments(hidden, jnp.asarray([[1, 1, 2, 0]]), num_segments=3).tolist()
  [[[2.0], [5.0], [0.0]]]

  Args:
    hidden: Hidden states [R, T, D].
    segments: Slot of each token, 1..S; 0 for padding. int32 [R, T].
    num_segments: S.

  Returns:
    float32 [R, S, D]. Slot s is at index s - 1. The vector of a slot without tokens is zero.
  """
  slots = jnp.arange(1, num_segments + 1, dtype=segments.dtype)
  members = (segments[:, None, :] == slots[:, None]).astype(jnp.float32)  # [R, S, T]
  sums = jnp.einsum("rst,rtd->rsd", members, hidden.astype(jnp.float32), precision=lax.Precision.HIGHEST)
  return sums / jnp.maximum(members.sum(-1, keepdims=True), 1.0)


def last_places(segments: Int[Array, "R T"]) -> Int[Array, "R T"]:
  """Returns the segments with all but the last token of each set to 0, so that `pool_segments` pools the last token.

  >>> last_places(jnp.asarray([[1, 1, 2, 2, 2, 0]])).tolist()
  [[0, 1, 0, 0, 2, 0]]

  Args:
    segments: Slot of each token, 1..S; 0 for padding. int32 [R, T]. The tokens of a slot must be adjacent.
  """
  following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
  return jnp.where(segments != following, segments, 0)
