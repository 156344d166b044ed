"""Embeddings split by rows over the devices of a mesh."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax import sharding


def mesh_of(embeddings: jax.Array | np.ndarray) -> Mesh:
  """Returns the mesh over which `embeddings` are sharded, or else a mesh of one device."""
  where = getattr(embeddings, "sharding", None)
  if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
    return where.mesh
  return sharding.make_mesh(devices=jax.local_devices()[:1])


def shard_rows(embeddings: jax.Array | np.ndarray, mesh: Mesh) -> jax.Array:
  """Returns embeddings split by rows over all axes of a mesh.

  Args:
    embeddings: [N, D]. An array on the devices must have a number of rows that the devices divide, and is not copied if
      its rows are split over them already. Rows of zeros are appended to an array on the host.
    mesh: The devices.
  """
  where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  if isinstance(embeddings, np.ndarray):
    padding = sharding.padded_rows(len(embeddings)) - len(embeddings)
    return sharding.to_global(np.pad(embeddings, ((0, padding), (0, 0))), where)
  if embeddings.sharding.is_equivalent_to(where, embeddings.ndim):
    return embeddings
  return jax.device_put(embeddings, where)
