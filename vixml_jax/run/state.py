"""Train state, abstract first: shapes, then shardings, then values made by jit in their shardings."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from vixml_jax import sharding
from vixml_jax.label_classifiers import ClassifierState, classifier_shardings, new_classifiers
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.parameters import split_params
from vixml_jax.sharded_rows import ShardedRows
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
      query not seen yet. N is rounded up (`sharding.padded_rows`). After the last epoch, it may have fresh embeddings.
    centroids: [L, D] label centroids; zeros if the method has none. L is rounded up.
    label_clusters: int32 [L], the free vector of each label.
    classifiers: classifiers of the labels with their own optimizer state; None if the loss has none. They only serve
      training.
  """

  step: jax.Array
  params: Tree
  opt_state: Any
  bank: jax.Array
  centroids: jax.Array
  label_clusters: jax.Array
  classifiers: ClassifierState | None = None


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """The result of training that evaluation reads.

  Attributes:
    step: the checkpoint's step.
    meta: JSON part of the checkpoint: config, provenance, seconds and tokens trained.
    params: nested dict of the trained parameters.
    centroids: float32 [L rounded up, D], sharded by rows.
    label_clusters: int32 [L] on the host.
    train_embeddings: plain embeddings of all training queries, float32 [N, D], where training has just made them; None
      otherwise.
  """

  step: int
  meta: dict[str, Any]
  params: Tree
  centroids: jax.Array
  label_clusters: np.ndarray
  train_embeddings: ShardedRows | None = None


def trained_model(
  step: int, meta: dict[str, Any], parts: dict[str, Any], num_labels: int, train_embeddings: ShardedRows | None = None
) -> TrainedModel:
  """Returns a trained model.

  Args:
    step: the checkpoint's step.
    meta: JSON part of the checkpoint.
    parts: `params`, `centroids` and `label_clusters` of a state.
    num_labels: L.
    train_embeddings: see `TrainedModel`.
  """
  clusters = sharding.to_host(parts["label_clusters"])[:num_labels]
  return TrainedModel(step, meta, parts["params"], parts["centroids"], clusters, train_embeddings)


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
  return init_program(model, mesh, part)(jax.random.key(seed))


def init_program(
  model: ModelDefinition, mesh: Mesh, part: Callable[[Tree], Tree] = lambda tree: tree
) -> jax.stages.Wrapped:
  """Returns the jitted `key -> parameters` of `init_params`."""

  def init(key: jax.Array) -> Tree:
    return part(split_params(DualEncoder(**model.arguments, rngs=nnx.Rngs(key)))[1])

  shardings = part(sharding.tree_shardings(mesh, model.shapes, model.axes))
  return jax.jit(init, out_shardings=shardings)


def abstract_params(model: ModelDefinition, mesh: Mesh) -> Tree:
  """Returns all parameters, trained and frozen, as `jax.ShapeDtypeStruct`s with shardings."""
  return _structs(model.shapes, sharding.tree_shardings(mesh, model.shapes, model.axes))


def abstract_model_part(model: ModelDefinition, num_labels: int, mesh: Mesh) -> dict[str, Any]:
  """Returns the part of a state that a trained model consists of, as `jax.ShapeDtypeStruct`s with shardings."""
  labels = sharding.padded_rows(num_labels)
  params, _ = model.split(abstract_params(model, mesh))
  return {
    "params": params,
    "centroids": jax.ShapeDtypeStruct(
      (labels, model.embed_dim), jnp.float32, sharding=sharding.named_sharding(mesh, "label", "vector")
    ),
    "label_clusters": jax.ShapeDtypeStruct((labels,), jnp.int32, sharding=sharding.named_sharding(mesh, "label")),
  }


def abstract_state(
  model: ModelDefinition,
  optimizer: optax.GradientTransformation,
  num_queries: int,
  num_labels: int,
  bank_dtype: str,
  mesh: Mesh,
  *,
  has_classifiers: bool = False,
) -> TrainState:
  """Returns the state as `jax.ShapeDtypeStruct`s with shardings.

  Restoring, ahead-of-time compilation and `create_state` start from it. The optimizer must be made for the trained
  parameters; frozen parameters are not part of the state.
  """
  replicated = sharding.named_sharding(mesh)
  part = abstract_model_part(model, num_labels, mesh)
  opt_shapes = jax.eval_shape(optimizer.init, part["params"])
  opt_shardings = optax.tree_utils.tree_map_params(
    optimizer, lambda _, param: param.sharding, opt_shapes, part["params"], transform_non_params=lambda _: replicated
  )
  rest: dict[str, Any] = {
    "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    "bank": jax.ShapeDtypeStruct(
      (sharding.padded_rows(num_queries), model.embed_dim),
      jnp.dtype(bank_dtype),
      sharding=sharding.named_sharding(mesh, "query", "vector"),
    ),
  }
  if has_classifiers:
    shapes = jax.eval_shape(functools.partial(new_classifiers, num_labels, model.embed_dim))
    rest["classifiers"] = _structs(shapes, classifier_shardings(mesh))
  return TrainState(opt_state=_structs(opt_shapes, opt_shardings), **part, **rest)


def _structs(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
  )


def shardings_of(state: TrainState) -> TrainState:
  """Returns the shardings of an abstract or real state, as a tree of the same form."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def create_state(
  abstract: TrainState,
  params: Tree,
  optimizer: optax.GradientTransformation,
  label_clusters: np.ndarray | None = None,
  centroids: jax.Array | None = None,
) -> TrainState:
  """Returns a state at step 0, with a new optimizer state and a bank of zeros.

  Args:
    abstract: shapes and shardings of the state.
    params: trained parameters.
    optimizer: optimizer of these parameters.
    label_clusters: int [L] on the host, the free vector of each label; None for the first free vector.
    centroids: [L rounded up, D], sharded by rows; None for zeros.
  """
  opt_state, step, bank, classifiers = start_program(abstract, optimizer)(params)
  if centroids is None:
    centroids = jax.jit(lambda: _zeros(abstract.centroids), out_shardings=abstract.centroids.sharding)()
  clusters = np.zeros(abstract.label_clusters.shape, np.int32)
  if label_clusters is not None:
    clusters[: len(label_clusters)] = label_clusters
  placed = sharding.to_global(clusters, abstract.label_clusters.sharding)
  return TrainState(step, params, opt_state, bank, centroids, placed, classifiers)


def start_program(abstract: TrainState, optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
  """Returns the jitted `parameters -> (optimizer state, step, bank, classifiers)` of `create_state`."""
  where = shardings_of(abstract)

  def init_state(params: Tree) -> tuple[Any, ...]:
    # Classifiers and their moments start as zeros, too.
    classifiers = jax.tree.map(_zeros, abstract.classifiers)
    return optimizer.init(params), _zeros(abstract.step), _zeros(abstract.bank), classifiers

  return jax.jit(init_state, out_shardings=(where.opt_state, where.step, where.bank, where.classifiers))


def _zeros(leaf: Any) -> jax.Array:
  return jnp.zeros(leaf.shape, leaf.dtype)
