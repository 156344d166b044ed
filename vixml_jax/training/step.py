"""The jitted training step: encode the batch in chunks, loss over all of it, update, refresh the bank."""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import optax

from vixml_jax import sharding
from vixml_jax.encoding.inputs import EncoderInputs, image_tokens, inputs_on_mesh
from vixml_jax.images.features import ImageFeatures
from vixml_jax.input.batches import Batch
from vixml_jax.input.packing import PackedLayout
from vixml_jax.label_classifiers import prefix_softmax, updated
from vixml_jax.losses import LossConfig, matryoshka_loss, mean_cosine, prime_loss, siamese_loss
from vixml_jax.models.chunks import map_chunks, map_chunks_recomputed
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.dual_encoder import l2_normalize
from vixml_jax.models.parameters import join_params
from vixml_jax.run.state import TrainState, shardings_of
from vixml_jax.sharded_rows import put_rows
from vixml_jax.training.optimizer import optimizer_from_config, schedule
from vixml_jax.typing import Array, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceBatch:
  """A batch of B queries and B labels on the mesh.

  Attributes:
    inputs: packed rows of the queries and then the labels, [chunks, R, ...].
    image_features: float16 [M, F], features of all images on the devices; None where `inputs` brings its own, and for
      a model of texts only.
    filled: bool [chunks], which chunks have any item.
    slots: int32 [2 B], place of each item's pooled output in the flattened [chunks * R * S].
    query_ids: int32 [B].
    label_ids: int32 [B], the positive drawn for each query.
    positives: bool [B, B], whether label j is a positive of query i.
    valid: bool [B], False for the empty places of an epoch's last batch.
    positive_ids: int32 [B, P], ids of all positives of each query, -1 for none; None without classifiers of labels.
  """

  inputs: EncoderInputs
  image_features: Array | None
  filled: Array
  slots: Array
  query_ids: Array
  label_ids: Array
  positives: Array
  valid: Array
  positive_ids: Array | None = None


@dataclasses.dataclass(frozen=True)
class ClassifierTraining:
  """How the classifiers of labels are trained beside the encoder.

  Attributes:
    weight: weight of the decoupled softmax of queries against classifiers in the loss.
    learning_rate: peak rate of the classifiers.
    schedule: factor on this rate at a step; the second argument is the number of steps of the run.
    num_labels: L.
  """

  weight: float
  learning_rate: float
  schedule: Callable[[Array, Array | None], Array]
  num_labels: int


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What a training step does.

  Attributes:
    model: definition of the model.
    optimizer: the optimizer of the trained parameters.
    layout: shape of packed rows.
    loss: constants of the loss.
    seed: seed of the run; a step's randomness depends on it and on the step's number only.
    rng_impl: implementation of JAX's random numbers, such as "threefry2x32".
    remat: recompute chunks in the backward pass, so that memory does not grow with the batch.
    chunks_in: where the chunks of a batch are run one after another: the whole "encoder", or each "layer" of it.
    matryoshka_dims: lengths of the prefixes of the embeddings that the loss is the mean over; empty for the whole ones.
    classifiers: how classifiers of labels are trained; None for a loss without them.
  """

  model: ModelDefinition
  optimizer: optax.GradientTransformationExtraArgs
  layout: PackedLayout
  loss: LossConfig
  seed: int
  rng_impl: str
  remat: bool
  chunks_in: str = "encoder"
  matryoshka_dims: tuple[int, ...] = ()
  classifiers: ClassifierTraining | None = None

  @property
  def base_key(self) -> Array:
    """The key that all random numbers on the devices are derived from."""
    return jax.random.key(self.seed, impl=self.rng_impl)


def step_config(
  config: ConfigDict, model: ModelDefinition, layout: PackedLayout, total_steps: int, num_labels: int
) -> StepConfig:
  """Returns the training step that a config describes, for a run of `total_steps` on L labels."""
  train, classifiers = config.train, None
  if train.classifier_weight:
    factor = lambda step, total: schedule(train.warmup_steps, total_steps if total is None else total)(step)
    classifiers = ClassifierTraining(train.classifier_weight, train.classifier_learning_rate, factor, num_labels)
  return StepConfig(
    model=model,
    optimizer=optimizer_from_config(config, model, total_steps),
    layout=layout,
    loss=LossConfig(**config.loss.to_dict()),
    seed=config.seed,
    rng_impl=config.train.rng_impl,
    remat=config.train.remat,
    chunks_in=config.train.chunks_in,
    matryoshka_dims=tuple(config.train.matryoshka_dims),
    classifiers=classifiers,
  )


def device_batch(batch: Batch, features: ImageFeatures | None, mesh: Mesh) -> DeviceBatch:
  """Puts a batch on the mesh. Every process has the whole host batch and keeps its shard.

  Args:
    batch: the batch on the host.
    features: features of the images; None for a model of texts only.
    mesh: the devices.
  """
  by_batch = sharding.named_sharding(mesh, "batch")
  replicated = sharding.named_sharding(mesh)
  items = batch.items
  return DeviceBatch(
    inputs=inputs_on_mesh(items, features, mesh),
    image_features=None if features is None else features.on_devices,
    filled=sharding.to_global(items.filled, replicated),
    slots=sharding.to_global(items.slots, replicated),
    query_ids=sharding.to_global(batch.query_ids, by_batch),
    label_ids=sharding.to_global(batch.label_ids, by_batch),
    positives=sharding.to_global(batch.positives, sharding.named_sharding(mesh, "batch", "vector")),
    valid=sharding.to_global(batch.valid, by_batch),
    positive_ids=None if batch.positive_ids is None else sharding.to_global(batch.positive_ids, replicated),
  )


def encode_batch(config: StepConfig, mesh: Mesh, params: Tree, batch: DeviceBatch, key: Array | None) -> Array:
  """Returns pooled outputs of the batch's items, encoded one chunk of rows at a time; empty chunks cost nothing.

  Returns:
    float32 [2 B, D], before normalization.
  """
  slots = config.layout.slots
  inputs, filled = batch.inputs, batch.filled
  if config.chunks_in == "layer" and len(filled) > 1:
    images = image_tokens(inputs.images, batch.image_features)
    with sharding.use_mesh(mesh):
      pooled = config.model.bind(params).pool_chunks(
        inputs.tokens, inputs.segments, inputs.positions, slots, filled, images, key
      )
  else:

    def encode(constants: tuple[Tree, Array | None], chunk: tuple[EncoderInputs, Array | None]) -> Array:
      params, features = constants
      inputs, chunk_key = chunk
      images = image_tokens(inputs.images, features)
      with sharding.use_mesh(mesh):
        return config.model.bind(params).pool(
          inputs.tokens, inputs.segments, inputs.positions, slots, images, chunk_key
        )

    indices = jnp.arange(len(filled))
    keys = None if key is None else jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    over_chunks = map_chunks_recomputed if config.remat else map_chunks
    pooled = over_chunks(encode, (params, batch.image_features), (inputs, keys), filled)
  return pooled.reshape(-1, config.model.embed_dim)[batch.slots]


def batch_loss(
  config: StepConfig, mesh: Mesh, params: Tree, state: TrainState, batch: DeviceBatch, key: Array
) -> tuple[Array, tuple[dict[str, Array], Array]]:
  """Returns the loss of a batch, its parts, and the query embeddings [B, D] for the bank.

  With `matryoshka_dims`, the loss sees prefixes of queries, labels and prototypes. Everything else uses whole vectors:
  the free vectors and centroids that make prototypes, and the bank, on which query clusters and centroids are computed.
  """
  dropout_key, prototype_key, loss_key = jax.random.split(key, 3)
  pooled = encode_batch(config, mesh, params, batch, dropout_key)
  pooled = jax.lax.with_sharding_constraint(pooled, sharding.named_sharding(mesh, "batch", "vector"))
  query_pooled, label_pooled = jnp.split(pooled, 2)
  model = config.model.bind(params)
  prototypes = model.prototypes(
    label_pooled, state.label_clusters[batch.label_ids], state.centroids[batch.label_ids], prototype_key
  )
  queries = l2_normalize(query_pooled)
  is_prime = model.method == "prime"
  embeddings = (queries, l2_normalize(label_pooled), prototypes) if is_prime else (queries, prototypes)
  function: Callable[..., tuple[Array, dict[str, Array]]] = prime_loss if is_prime else siamese_loss
  loss_of = functools.partial(function, positives=batch.positives, valid=batch.valid, key=loss_key, config=config.loss)
  if config.matryoshka_dims:
    loss, parts = matryoshka_loss(loss_of, embeddings, config.matryoshka_dims, l2_normalize)
  else:
    loss, parts = loss_of(*embeddings)
  return loss, (parts, queries)


def train_step(
  config: StepConfig,
  mesh: Mesh,
  base_key: Array,
  state: TrainState,
  frozen: Tree,
  batch: DeviceBatch,
  total_steps: Array | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """Returns the state after one optimizer step, and the step's metrics; see `make_train_step`."""
  key = jax.random.fold_in(base_key, state.step)

  def loss_of(trainable: Tree, classifiers: Array | None) -> tuple[Array, tuple[dict[str, Array], Array]]:
    # Frozen parameters have no tangent here, so no gradient of them is computed.
    loss, (parts, queries) = batch_loss(config, mesh, join_params(trainable, frozen), state, batch, key)
    if config.classifiers is None:
      return loss, (parts, queries)
    how, dims = config.classifiers, config.matryoshka_dims
    assert batch.positive_ids is not None and classifiers is not None
    added = prefix_softmax(classifiers, queries, batch.positive_ids, how.num_labels, mesh, dims)
    loss = loss + how.weight * added
    return loss, (parts | {"loss": loss, "classifier_loss": added}, queries)

  trained = None if state.classifiers is None else state.classifiers.classifiers
  (gradients, by_classifiers), (parts, queries) = jax.grad(loss_of, argnums=(0, 1), has_aux=True)(state.params, trained)
  updates, opt_state = config.optimizer.update(gradients, state.opt_state, state.params, total_steps=total_steps)
  # Empty places of the batch have no row in the bank.
  bank_rows = jnp.where(batch.valid, batch.query_ids, -1)
  bank = put_rows(state.bank, bank_rows, jax.lax.stop_gradient(queries), mesh)
  classifiers = state.classifiers
  if classifiers is not None and config.classifiers is not None:
    rate = config.classifiers.learning_rate * config.classifiers.schedule(state.step, total_steps)
    classifiers = updated(classifiers, by_classifiers, rate)
  new_state = dataclasses.replace(
    state,
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    bank=bank,
    classifiers=classifiers,
  )
  checked = {"gradient_norm": optax.tree.norm(gradients), "query_cosine": mean_cosine(queries, batch.valid)}
  return new_state, parts | checked


def make_train_step(config: StepConfig, abstract: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
  """Returns the jitted `(state, frozen, batch, total_steps=None) -> (state, metrics)`.

  The state is donated and keeps its shardings. `frozen` are the parameters that are not trained; they are only read.
  `total_steps`, an integer on the devices, replaces the number of steps that the optimizer was made for.

  Args:
    config: what a step does.
    abstract: shapes and shardings of the state.
    mesh: the devices.
  """
  step = functools.partial(train_step, config, mesh, config.base_key)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(abstract), None))
