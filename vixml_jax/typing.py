"""Array aliases with checked shapes, and the dimension letters used in signatures and docstrings.

N training queries, L labels, B batch of queries, R packed rows, T tokens in a row, S text slots in a
row, I images an item, D embedding, F image feature, C free vectors, K top k, Q searched queries.
"""

import jax
from jaxtyping import Bool, Float, Int, Key

Array = jax.Array
Tree = dict  # Nested dict of arrays: parameters, or anything that mirrors them.

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Tree"]
