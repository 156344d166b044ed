"""Train state, abstract first: shapes, then shardings, then values made by jit in their shardings."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
import numpy as np
import optax

from vixml_jax import sharding
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.parameters import split_params
from vixml_jax.typing import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a training step reads and writes.

  Attributes:
    step: int32 scalar, steps done.
    params: nested dict of the trained parameters.
    opt_state: optimizer state.
    bank: [N, D] embedding bank: each training query's embedding from the last batch that contained it; zeros for a
      query not seen yet. N is rounded up (`sharding.padded_rows`).
    centroids: [L, D] label centroids. L is rounded up.
    label_clusters: int32 [L], the free vector of each label.
  """

  step: jax.Array
  params: Tree
  opt_state: Any
  bank: jax.Array
  centroids: jax.Array
  label_clusters: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """The result of training that evaluation reads.

  Attributes:
    step: the checkpoint's step.
    meta: JSON part of the checkpoint: config, provenance, seconds and tokens trained.
    params: nested dict of the trained parameters.
    centroids: float32 [L, D] on the host.
    label_clusters: int32 [L] on the host.
    train_embeddings: float32 [N, D], plain embeddings of all training queries, where training has just made them;
      None otherwise.
  """

  step: int
  meta: dict[str, Any]
  params: Tree
  centroids: np.ndarray
  label_clusters: np.ndarray
  train_embeddings: np.ndarray | None = None


def trained_model(
  step: int, meta: dict[str, Any], parts: dict[str, Any], num_labels: int, train_embeddings: np.ndarray | None = None
) -> TrainedModel:
  """Returns a trained model with centroids and label clusters on the host, without the rows that pad them.

  Args:
    step: the checkpoint's step.
    meta: JSON part of the checkpoint.
    parts: `params`, `centroids` and `label_clusters` of a state.
    num_labels: L.
    train_embeddings: see `TrainedModel`.
  """
  centroids, clusters = (sharding.to_host(parts[name])[:num_labels] for name in ("centroids", "label_clusters"))
  return TrainedModel(step, meta, parts["params"], centroids, clusters, train_embeddings)


def model_part(state: TrainState) -> dict[str, Any]:
  """Returns the part of a state that a trained model consists of."""
  return {"params": state.params, "centroids": state.centroids, "label_clusters": state.label_clusters}


def init_params(
  model: ModelDefinition, mesh: Mesh, seed: int, part: Callable[[Tree], Tree] = lambda tree: tree
) -> Tree:
  """Returns random parameters; each device makes its own shard.

  Args:
    model: definition of the model.
    mesh: the devices.
    seed: determines all values.
    part: selects, from a tree with the keys of all parameters, those to make.
  """

  def init(key: jax.Array) -> Tree:
    return part(split_params(DualEncoder(**model.arguments, rngs=nnx.Rngs(key)))[1])

  shardings = part(sharding.tree_shardings(mesh, model.shapes, model.axes))
  return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def abstract_params(model: ModelDefinition, mesh: Mesh) -> Tree:
  """Returns all parameters, trained and frozen, as `jax.ShapeDtypeStruct`s with shardings."""
  return _structs(model.shapes, sharding.tree_shardings(mesh, model.shapes, model.axes))


def abstract_state(
  model: ModelDefinition,
  optimizer: optax.GradientTransformation,
  num_queries: int,
  num_labels: int,
  bank_dtype: str,
  mesh: Mesh,
) -> TrainState:
  """Returns the state as `jax.ShapeDtypeStruct`s with shardings.

  Restoring, ahead-of-time compilation and `create_state` start from it. The optimizer must be made for the trained
  parameters; frozen parameters are not part of the state.
  """
  queries = sharding.padded_rows(num_queries)
  labels = sharding.padded_rows(num_labels)
  replicated = sharding.named_sharding(mesh)
  params, _ = model.split(abstract_params(model, mesh))
  opt_shapes = jax.eval_shape(optimizer.init, params)
  opt_shardings = optax.tree_utils.tree_map_params(
    optimizer, lambda _, param: param.sharding, opt_shapes, params, transform_non_params=lambda _: replicated
  )

  def struct(shape: tuple[int, ...], dtype: Any, where: Sharding) -> Any:
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
  """Returns rows with zero rows below, in the shape, dtype and sharding of an array of the state."""
  host = np.zeros(like.shape, like.dtype)
  host[: len(rows)] = sharding.to_host(rows)
  return sharding.to_global(host, like.sharding)


def shardings_of(state: TrainState) -> TrainState:
  """Returns the shardings of an abstract or real state, as a tree of the same form."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def create_state(abstract: TrainState, params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns a state at step 0: the given parameters, a new optimizer state, zero bank and centroids, cluster 0."""

  def rest(params: Tree) -> tuple[Any, ...]:
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    return optimizer.init(params), *(
      zeros(x) for x in (abstract.step, abstract.bank, abstract.centroids, abstract.label_clusters)
    )

  where = shardings_of(abstract)
  opt_state, step, bank, centroids, label_clusters = jax.jit(
    rest, out_shardings=(where.opt_state, where.step, where.bank, where.centroids, where.label_clusters)
  )(params)
  return TrainState(step, params, opt_state, bank, centroids, label_clusters)
