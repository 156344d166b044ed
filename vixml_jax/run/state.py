"""Train state: abstract first (shapes -> shardings), then created by jit straight into its shardings."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from vixml_jax import sharding
from vixml_jax.models import layers
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.typing import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step reads and writes.

  Attributes:
    step: int32 scalar, steps done.
    params: nested dict of the parameters that are trained.
    opt_state: optimizer state.
    bank: [N, D] embedding bank: each training query's embedding from the last batch it was in; zeros
      for one not seen yet. N is rounded up (`sharding.padded_rows`).
    centroids: [L, D] label centroids. L is rounded up as well.
    label_clusters: int32 [L], the free vector that each label uses.
  """

  step: jax.Array
  params: Tree
  opt_state: Any
  bank: jax.Array
  centroids: jax.Array
  label_clusters: jax.Array


def init_params(
  model: ModelDefinition, mesh: Mesh, seed: int, part: Callable[[Tree], Tree] = lambda tree: tree
) -> Tree:
  """Random parameters, each device making its own part.

  Args:
    model: the model's definition.
    mesh: the devices.
    seed: all that the values depend on.
    part: takes what is wanted out of a tree with the keys of all parameters; nothing else is made.
  """

  def init(key):
    return part(layers.split_params(DualEncoder(**model.arguments, rngs=nnx.Rngs(key)))[1])

  shardings = part(sharding.tree_shardings(mesh, model.shapes, model.axes))
  return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def abstract_params(model: ModelDefinition, mesh: Mesh) -> Tree:
  """All parameters, trained and frozen, as `jax.ShapeDtypeStruct`s that carry their shardings."""
  return _structs(model.shapes, sharding.tree_shardings(mesh, model.shapes, model.axes))


def abstract_state(
  model: ModelDefinition,
  optimizer: optax.GradientTransformation,
  num_queries: int,
  num_labels: int,
  bank_dtype: str,
  mesh: Mesh,
) -> TrainState:
  """The state as `jax.ShapeDtypeStruct`s that carry their shardings.

  Restoring, ahead-of-time compilation and `create_state` all start from this. `optimizer` is made for what the model
  trains; what it does not is no part of the state.
  """
  queries = sharding.padded_rows(num_queries)
  labels = sharding.padded_rows(num_labels)
  replicated = sharding.named_sharding(mesh)
  params, _ = model.split(abstract_params(model, mesh))
  opt_shapes = jax.eval_shape(optimizer.init, params)
  opt_shardings = optax.tree_utils.tree_map_params(
    optimizer, lambda _, param: param.sharding, opt_shapes, params, transform_non_params=lambda _: replicated
  )

  def struct(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  return TrainState(
    step=struct((), jnp.int32, replicated),
    params=params,
    opt_state=_structs(opt_shapes, opt_shardings),
    bank=struct((queries, model.embed_dim), jnp.dtype(bank_dtype), sharding.named_sharding(mesh, "query", "vector")),
    centroids=struct((labels, model.embed_dim), jnp.float32, sharding.named_sharding(mesh, "label", "vector")),
    label_clusters=struct((labels,), jnp.int32, sharding.named_sharding(mesh, "label")),
  )


def _structs(shapes: Tree, shardings: Tree) -> Tree:
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
  )


def padded_like(rows: np.ndarray | jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
  """Rows in the place of an array of the state that has some more; those are zero."""
  host = np.zeros(like.shape, like.dtype)
  host[: len(rows)] = sharding.to_host(rows)
  return sharding.to_global(host, like.sharding)


def shardings_of(state: TrainState) -> TrainState:
  """The shardings of an abstract or real state, as a tree of the same form."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def create_state(abstract: TrainState, params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
  """A state at step 0: given parameters, fresh optimizer, empty bank, zero centroids, every label in cluster 0."""

  def rest(params):
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    return optimizer.init(params), *(
      zeros(x) for x in (abstract.step, abstract.bank, abstract.centroids, abstract.label_clusters)
    )

  where = shardings_of(abstract)
  opt_state, step, bank, centroids, label_clusters = jax.jit(
    rest, out_shardings=(where.opt_state, where.step, where.bank, where.centroids, where.label_clusters)
  )(params)
  return TrainState(step, params, opt_state, bank, centroids, label_clusters)
