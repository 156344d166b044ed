"""Compact codes of label vectors, in int8 or in one bit for each dimension, and their scores.

The vectors of a trained model may point in nearly one direction, and what tells them apart is small beside it. So each
label x is split into its part along the mean direction m of all labels and the rest, x = t m + r, and only r is
encoded. Queries are split in the same way, q = u m + p. Then q.x = t u + p.r, of which the first term is exact. A code
c of r has one scale s for each label, and the score of a label is

  t u + s (a c.p' + b),

where p' is p in int8, c.p' is a sum of products of integers, and a and b belong to the query.

int8: r is close to r' = s c, where c is r / s rounded and s the greatest absolute value of r by 127. Its error |r - r'|
is at most `residual` s, where `residual` is the greatest such ratio of all labels. By the inequality of Cauchy and
Schwarz

  p.r <= p.r' + |p| |r - r'| <= s (c.p + residual |p|) <= s (c.p' + residual |p|) + |p - p'| |r'|,

so with b = `residual` |p|, the score plus a number that depends on the query alone is above q.x (`slack_of`). If it is
below the k-th exact score for a label, the label is not among the best k.

bit: a bit is the sign of a dimension of r. The scale is |r|^2 / |r|_1, so that the signs times s have the component |r|
along r (as in RaBitQ, arXiv 2405.12497, without its rotation). The score estimates q.x and bounds nothing.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

DTYPES = ("float32", "int8", "bit")
"""Types of the vectors that are searched; "float32" has no codes."""
_LARGEST = 127
_ROUNDOFF = 2.0**-24  # Of float32.
_SAFETY = 1.001  # For the roundoff of the bound itself.
_NUMBERS = 8  # Bytes of the scale and of the part along the mean.


class LabelCodes(NamedTuple):
  """Codes of n labels.

  Attributes:
    values: int8 [n, D], or uint8 [n, D / 8 rounded up] for bits.
    scales: float32 [n], the s of the scores.
    along: float32 [n], the t of the scores.
  """

  values: jax.Array
  scales: jax.Array
  along: jax.Array


class Extremes(NamedTuple):
  """Greatest values of labels in int8; zeros for bits.

  Attributes:
    residual: float32 [], of |r - r'| / s.
    rest: float32 [], of |r'|.
    length: float32 [], of |x|.
  """

  residual: jax.Array
  rest: jax.Array
  length: jax.Array


class QueryCodes(NamedTuple):
  """Queries in int8.

  Attributes:
    values: int8 [Q, D].
    factor: float32 [Q, 1], the a of the scores.
    offset: float32 [Q, 1], the b of the scores.
    along: float32 [Q, 1], the u of the scores.
    slack: float32 [Q], what must be added to scores in int8 to be above q.x.
  """

  values: jax.Array
  factor: jax.Array
  offset: jax.Array
  along: jax.Array
  slack: jax.Array


def bytes_per_label(dtype: str, dims: int) -> int:
  """Returns the bytes of a label's vector in the memory that is searched.

  >>> [bytes_per_label(dtype, 768) for dtype in DTYPES]
  [3072, 776, 104]
  """
  return 4 * dims if dtype == "float32" else code_width(dtype, dims) + _NUMBERS


def code_width(dtype: str, dims: int) -> int:
  """Returns the number of bytes of a code, without the numbers beside it."""
  return dims if dtype == "int8" else math.ceil(dims / 8)


def empty_codes(dtype: str, labels: int, dims: int, device: jax.Device) -> LabelCodes:
  """Returns codes of zeros on a device."""
  number = jnp.int8 if dtype == "int8" else jnp.uint8
  numbers = [jnp.zeros(labels, jnp.float32, device=device) for _ in range(2)]
  return LabelCodes(jnp.zeros((labels, code_width(dtype, dims)), number, device=device), *numbers)


@functools.partial(jax.jit, static_argnums=0)
def encode(dtype: str, rows: jax.Array, direction: jax.Array) -> tuple[LabelCodes, Extremes]:
  """Encodes labels.

  Args:
    dtype: "int8" or "bit".
    rows: float32 [n, D].
    direction: float32 [D], the mean direction at unit norm, or zeros.
  """
  along, rest = _split(rows, direction)
  if dtype == "int8":
    values, scales = _int8(rest)
    restored = scales[:, None] * values.astype(jnp.float32)
    ratios = _norms(rest - restored) / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)
    extremes = Extremes(*(jnp.max(x) for x in (ratios, _norms(restored), _norms(rows))))
    return LabelCodes(values, scales, along), extremes
  bits = jnp.pad((rest > 0).astype(jnp.uint8), ((0, 0), (0, -rows.shape[1] % 8)))
  values = jnp.sum(bits.reshape(len(rows), -1, 8) << jnp.arange(8, dtype=jnp.uint8), axis=2, dtype=jnp.uint8)
  scales = jnp.sum(jnp.square(rest), axis=1) / jnp.maximum(jnp.sum(jnp.abs(rest), axis=1), 1e-30)
  return LabelCodes(values, scales, along), Extremes(*[jnp.zeros(())] * 3)


def encode_queries(dtype: str, queries: jax.Array, direction: jax.Array, extremes: Extremes) -> QueryCodes:
  """Returns queries float32 [Q, D] in int8, with the numbers of their scores."""
  along, rest = _split(queries, direction)
  values, scales = _int8(rest)
  scales, along = scales[:, None], along[:, None]
  if dtype == "bit":  # A bit b stands for the sign 2 b - 1.
    sums = jnp.sum(values, axis=1, keepdims=True, dtype=jnp.int32)
    return QueryCodes(values, 2 * scales, -scales * sums, along, jnp.zeros(len(queries)))
  rounding = _norms(rest - scales * values.astype(jnp.float32))
  # Sums of D products: the exact score, and t and u, whose errors are not part of p and r.
  roundoff = (3 * queries.shape[1] + 16) * _ROUNDOFF * _norms(queries) * extremes.length
  slack = _SAFETY * (rounding * extremes.rest + roundoff)
  return QueryCodes(values, scales, extremes.residual * _norms(rest)[:, None], along, slack)


def scores(dtype: str, queries: QueryCodes, labels: LabelCodes) -> jax.Array:
  """Returns the scores of n labels for Q queries, float32 [Q, n]; see the module."""
  values = labels.values
  if dtype == "bit":
    bits = (values[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    values = bits.astype(jnp.int8).reshape(len(values), -1)[:, : queries.values.shape[1]]
  products = jnp.einsum("qd,ld->ql", queries.values, values, preferred_element_type=jnp.int32)
  return labels.along * queries.along + labels.scales * (queries.factor * products.astype(jnp.float32) + queries.offset)


def _split(rows: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the parts of rows along a direction [n], and the rests [n, D]."""
  along = jnp.matmul(rows, direction, precision=jax.lax.Precision.HIGHEST)
  return along, rows - along[:, None] * direction


def _int8(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns rows [n, D] as int8 and their scales [n]; a row of zeros has the scale 0."""
  scales = jnp.max(jnp.abs(rows), axis=1) / _LARGEST
  values = jnp.rint(rows / jnp.where(scales > 0, scales, 1.0)[:, None])
  return jnp.clip(values, -_LARGEST, _LARGEST).astype(jnp.int8), scales


def _norms(rows: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))
