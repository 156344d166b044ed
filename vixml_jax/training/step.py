"""The jitted training step: encode the batch in chunks, PRIME loss over all of it, update, refresh the bank."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from vixml_jax import sharding
from vixml_jax.encoding.chunks import map_chunks, map_chunks_recomputed
from vixml_jax.images.features import ImageFeatures
from vixml_jax.input.batches import Batch
from vixml_jax.input.packing import PackedLayout
from vixml_jax.losses import LossConfig, prime_loss
from vixml_jax.models import layers
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.dual_encoder import l2_normalize
from vixml_jax.models.fusion import image_tokens
from vixml_jax.run.state import TrainState, shardings_of
from vixml_jax.typing import Array, Tree


def device_batch(batch: Batch, mesh: Mesh, bank: ImageFeatures | None = None) -> dict[str, Any]:
  """Puts a batch on the mesh; every process holds the whole host batch and keeps its part.

  Args:
    batch: on the host.
    mesh: the devices.
    bank: features of the images, for a model that takes images.
  """
  rows = sharding.named_sharding(mesh, "chunk", "row", "vector")
  by_batch = sharding.named_sharding(mesh, "batch")
  replicated = sharding.named_sharding(mesh)
  items = batch.items
  images = None if bank is None or items.images is None else bank.on_mesh(items.images, mesh)
  return {
    "tokens": sharding.to_global(items.tokens, rows),
    "segments": sharding.to_global(items.segments, rows),
    "positions": sharding.to_global(items.positions, rows),
    "images": images,
    "image_bank": None if bank is None else bank.on_devices,
    "filled": sharding.to_global(np.asarray((items.segments > 0).any(axis=(1, 2))), replicated),
    "slots": sharding.to_global(items.slots, replicated),
    "query_ids": sharding.to_global(batch.query_ids, by_batch),
    "label_ids": sharding.to_global(batch.label_ids, by_batch),
    "positives": sharding.to_global(batch.positives, sharding.named_sharding(mesh, "batch", "vector")),
    "valid": sharding.to_global(batch.valid, by_batch),
  }


def encode_chunks(
  model: ModelDefinition,
  params: Tree,
  batch: dict[str, Any],
  layout: PackedLayout,
  key: Array | None,
  remat: bool,
  mesh: Mesh,
) -> Array:
  """Pooled vectors of the batch's items, one chunk of rows at a time.

  With `remat` a chunk's activations are recomputed in the backward pass, so that memory does not grow with the batch.
  Empty chunks cost nothing.

  Returns:
    float32 [2 B, D], pooled encoder outputs before the norm.
  """
  trainable, frozen = model.split(params)

  def encode(trainable, constants, chunk):
    frozen, bank = constants
    tokens, segments, positions, images, chunk_key = chunk
    images = None if images is None else image_tokens(images, bank)
    bound = model.bind(layers.join_params(trainable, frozen))
    with sharding.use_mesh(mesh):
      return bound.pool(tokens, segments, positions, layout.slots, images, chunk_key)

  indices = jnp.arange(len(batch["tokens"]))
  keys = None if key is None else jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
  chunks = (batch["tokens"], batch["segments"], batch["positions"], batch["images"], keys)
  over_chunks = map_chunks_recomputed if remat else map_chunks
  pooled = over_chunks(encode, trainable, (frozen, batch["image_bank"]), chunks, batch["filled"])
  return pooled.reshape(-1, model.embed_dim)[batch["slots"]]


def batch_loss(
  model: ModelDefinition,
  params: Tree,
  state: TrainState,
  batch: dict[str, Any],
  layout: PackedLayout,
  loss_config: LossConfig,
  key: Array,
  remat: bool,
  mesh: Mesh,
) -> tuple[Array, tuple[dict[str, Array], Array]]:
  """Loss of a batch, its parts, and the query embeddings [B, D] for the bank."""
  dropout_key, prototype_key, loss_key = jax.random.split(key, 3)
  pooled = encode_chunks(model, params, batch, layout, dropout_key, remat, mesh)
  pooled = jax.lax.with_sharding_constraint(pooled, sharding.named_sharding(mesh, "batch", "vector"))
  query_pooled, label_pooled = jnp.split(pooled, 2)
  label_ids = batch["label_ids"]
  prototypes = model.bind(params).prototypes(
    label_pooled, state.label_clusters[label_ids], state.centroids[label_ids], prototype_key
  )
  queries = l2_normalize(query_pooled)
  loss, parts = prime_loss(
    queries, l2_normalize(label_pooled), prototypes, batch["positives"], batch["valid"], loss_key, loss_config
  )
  return loss, (parts, queries)


def train_step(
  state: TrainState,
  frozen: Tree,
  batch: dict[str, Any],
  *,
  model: ModelDefinition,
  optimizer: optax.GradientTransformation,
  layout: PackedLayout,
  loss_config: LossConfig,
  base_key: Array,
  remat: bool,
  mesh: Mesh,
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step; see `make_train_step`."""
  key = jax.random.fold_in(base_key, state.step)

  def loss_of(trainable):  # What is frozen has no tangent, so no gradient of it is computed.
    params = layers.join_params(trainable, frozen)
    return batch_loss(model, params, state, batch, layout, loss_config, key, remat, mesh)

  gradients, (parts, queries) = jax.grad(loss_of, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  # Padded places point past the end, where the scatter drops them.
  bank_rows = jnp.where(batch["valid"], batch["query_ids"], state.bank.shape[0])
  bank = state.bank.at[bank_rows].set(
    jax.lax.stop_gradient(queries).astype(state.bank.dtype), mode="drop", unique_indices=False
  )
  metrics = parts | {"gradient_norm": optax.tree.norm(gradients)}
  return TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    bank=bank,
    centroids=state.centroids,
    label_clusters=state.label_clusters,
  ), metrics


def make_train_step(
  abstract: TrainState,
  *,
  model: ModelDefinition,
  optimizer: optax.GradientTransformation,
  layout: PackedLayout,
  loss_config: LossConfig,
  base_key: Array,
  remat: bool,
  mesh: Mesh,
) -> jax.stages.Wrapped:
  """Compiles `(state, frozen, batch) -> (state, metrics)`.

  The state is donated and keeps its shardings; `frozen` are the parameters that are not trained, read only.

  Args:
    abstract: the state's shapes and shardings.
    model, optimizer, layout, loss_config: what to train and how.
    base_key: the run's random key; a step's randomness depends on it and on `state.step` only.
    remat: recompute chunks in the backward pass.
    mesh: the devices.
  """
  step = functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    layout=layout,
    loss_config=loss_config,
    base_key=base_key,
    remat=remat,
    mesh=mesh,
  )
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(abstract), None))
