"""Sharded rows of arrays that a test has whole on its host."""

import jax
import numpy as np

from vixml_jax import sharding
from vixml_jax.sharded_rows import ShardedRows


def from_host(rows, mesh):
  """Returns rows [n, D] that every process holds whole on its host, split over the devices of a mesh."""
  padded = np.pad(rows, ((0, sharding.padded_rows(len(rows)) - len(rows)), (0, 0)))
  where = sharding.named_sharding(mesh, "query", "vector")
  return ShardedRows(jax.make_array_from_callback(padded.shape, where, lambda index: padded[index]), len(rows))
