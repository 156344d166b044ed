"""The state before the first step: parameters, the free vector of each label, label centroids, provenance."""

from pathlib import Path

import jax
from ml_collections import ConfigDict
import numpy as np
import optax

from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.input.batches import TrainingQueries
from vixml_jax.mining.centroids import cluster_means, label_centroids
from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.run.checkpoint import Checkpoint, provenance
from vixml_jax.run.from_config import adapter_folder
from vixml_jax.run.pretrained import trainable_params, weight_hashes
from vixml_jax.run.state import TrainState, create_state
from vixml_jax.training.image_residual import start_residual
from vixml_jax.typing import Tree

_NORM_SAMPLE = 1024  # Queries that the length of pooled outputs is measured on.


def initial_checkpoint(
  config: ConfigDict,
  abstract: TrainState,
  optimizer: optax.GradientTransformation,
  queries: TrainingQueries,
  encoder: ItemEncoder,
  weights_folder: Path | None,
  data_fingerprint: str,
  *,
  has_steps: bool,
) -> Checkpoint:
  """Returns the checkpoint of step 0.

  Args:
    config: the whole config.
    abstract: shapes and shardings of the state.
    optimizer: optimizer of the trained parameters.
    queries: training queries and labels.
    encoder: encodes items, given the trained parameters.
    weights_folder: folder of the pretrained encoder; None for a random encoder.
    data_fingerprint: identifies the data.
    has_steps: whether any step follows. If none does, centroids stay zero, since they are computed at the end.
  """
  adapter = adapter_folder(config)
  params = trainable_params(encoder.model, encoder.mesh, config.seed, weights_folder, adapter)
  if encoder.features is not None and config.fusion.residual:
    norm = config.fusion.residual * _pooled_text_norm(encoder, params, queries)
    params |= {"fusion": start_residual(params["fusion"], encoder.features, norm, config.seed)}
  clusters, free_vectors = _label_clusters(config, encoder, params, queries)
  if free_vectors is not None:
    params |= {"free_vectors": free_vectors}
  centroids = _first_centroids(encoder, params, queries) if encoder.model.has_centroids and has_steps else None
  state = create_state(abstract, params, optimizer, clusters, centroids)
  meta = provenance(data_fingerprint, weight_hashes(weights_folder)) | {
    "adapter_sha256": weight_hashes(adapter),
    "config": config.to_dict(),
    "train_seconds": 0.0,
    "tokens": 0,
  }
  return Checkpoint(state, None, meta)


def _pooled_text_norm(encoder: ItemEncoder, params: Tree, queries: TrainingQueries) -> float:
  """Returns the mean length of pooled texts of training queries."""
  sample = queries.items.take(np.arange(min(len(queries), _NORM_SAMPLE))).first_images(0)
  return np.linalg.norm(encoder.pooled(params, sample, "texts"), axis=1).mean()


def _first_centroids(encoder: ItemEncoder, params: Tree, queries: TrainingQueries) -> jax.Array:
  """Returns label centroids by the initial model, [L rounded up, D]; the embeddings of the queries are freed."""
  embeddings = encoder.embed_rows(params, queries.items, "training queries")
  return label_centroids(embeddings.values, queries.labels, len(queries.label_items))


def _label_clusters(
  config: ConfigDict, encoder: ItemEncoder, params: Tree, queries: TrainingQueries
) -> tuple[np.ndarray, jax.Array | None]:
  """Returns the free vector of each label, int [L], and initial free vectors [C, D]; None to keep the random ones.

  A label has a free vector of its own where there are enough. Otherwise it uses the vector of its balanced cluster,
  by the initial model's plain embeddings. With `train.free_vector_init=cluster_mean` a free vector starts as the mean
  embedding of its labels. Without free vectors (NGAME), all labels are one cluster.
  """
  if "free_vectors" not in params:
    return np.zeros(len(queries.label_items), np.int32), None
  items, num_vectors = queries.label_items, config.train.free_vectors
  own, from_embeddings = num_vectors >= len(items), config.train.free_vector_init == "cluster_mean"
  clusters = np.arange(len(items), dtype=np.int32)
  if own and not from_embeddings:
    return clusters, None
  embeddings = encoder.embed_rows(params, items, "labels").values
  if not own:
    clusters = balanced_kmeans(embeddings, num_vectors, seed=config.seed, num_rows=len(items))
  if not from_embeddings:
    return clusters, None
  return clusters, cluster_means(embeddings, clusters, num_vectors)
