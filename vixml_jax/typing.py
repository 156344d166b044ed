"""Array types with checked shapes, and the letters that name dimensions in signatures and docstrings.

N training queries, L labels, B batch of queries, R packed rows, T tokens in a row, S text slots in a row,
I images of an item, J image places in a row, M images of a data set, D embedding, F image feature, C free vectors,
K top k, Q searched queries.
"""

from typing import Any

import jax
from jaxtyping import Bool, Float, Int, Key, Shaped

Array = jax.Array
Tree = dict[str, Any]  # Nested dict of arrays: parameters, or any tree with the same keys.

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Shaped", "Tree"]
