"""Embeddings split over the devices of a mesh by rows, as mining wants them."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.sharding import to_global


def mesh_of(embeddings: jax.Array | np.ndarray) -> Mesh:
  """The mesh over which `embeddings` are sharded, else a mesh of one device."""
  sharding = getattr(embeddings, "sharding", None)
  if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
    return sharding.mesh
  return Mesh(np.array(jax.local_devices()[:1]), ("data",))


def shard_rows(embeddings: jax.Array | np.ndarray, mesh: Mesh, multiple: int = 1) -> jax.Array:
  """`embeddings` [N, D] split by rows over all axes of `mesh`.

  Rows of zeros are added until every device has the same number, a multiple of `multiple`. One
  device keeps the array as it is.
  """
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  if mesh.size == 1:
    return jax.device_put(embeddings, sharding)
  padding = -len(embeddings) % (multiple * mesh.size)
  if isinstance(getattr(embeddings, "sharding", None), NamedSharding):
    return _pad(embeddings, padding, sharding)
  return to_global(np.pad(np.asarray(embeddings), ((0, padding), (0, 0))), sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pad(embeddings, padding: int, sharding: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(jnp.pad(embeddings, ((0, padding), (0, 0))), sharding)
