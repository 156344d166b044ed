"""Embeddings split by rows over the devices of a mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vixml_jax.sharding import to_global


def mesh_of(embeddings: jax.Array | np.ndarray) -> Mesh:
  """Returns the mesh over which `embeddings` are sharded, or else a mesh of one device."""
  sharding = getattr(embeddings, "sharding", None)
  if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
    return sharding.mesh
  return Mesh(np.array(jax.local_devices()[:1]), ("data",))


def shard_rows(embeddings: jax.Array | np.ndarray, mesh: Mesh, multiple: int = 1) -> jax.Array:
  """Returns `embeddings` [N, D] split by rows over all axes of `mesh`.

  With several devices, rows of zeros are appended so that every device has the same number of rows, a multiple of
  `multiple`.
  """
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  if mesh.size == 1:
    return jax.device_put(embeddings, sharding)
  padding = -len(embeddings) % (multiple * mesh.size)
  if isinstance(embeddings, jax.Array) and isinstance(embeddings.sharding, NamedSharding):
    return _pad(embeddings, padding, sharding)
  return to_global(np.pad(np.asarray(embeddings), ((0, padding), (0, 0))), sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pad(embeddings: jax.Array, padding: int, sharding: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(jnp.pad(embeddings, ((0, padding), (0, 0))), sharding)
