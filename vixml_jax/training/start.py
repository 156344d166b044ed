"""What a run begins with: parameters, the free vector of each label, label centroids, and where all of it came from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.ragged import Ragged
from vixml_jax.run.checkpoint import Checkpoint, provenance
from vixml_jax.run.from_config import Run, adapter_folder
from vixml_jax.run.pretrained import trainable_params
from vixml_jax.run.state import create_state, padded_like
from vixml_jax.training.image_residual import start_residual
from vixml_jax.typing import Tree
from vixml_jax.weights import source

_NORM_SAMPLE = 1024  # Queries that the length of pooled vectors is measured on.


def start(run: Run) -> Checkpoint:
  """The state before the first step, as a checkpoint."""
  adapter = adapter_folder(run.config)
  params = trainable_params(run.model, run.mesh, run.config.seed, run.weights_folder, adapter)
  if run.bank is not None and run.config.fusion.residual:
    params |= {"fusion": start_residual(params["fusion"], run.bank, _residual_norm(run, params), run.config.seed)}
  clusters, free_vectors = _label_clusters(run, params)
  if free_vectors is not None:
    params |= {"free_vectors": padded_like(free_vectors, params["free_vectors"])}
  centroids = label_centroids(
    run.encoder.queries(params, run.queries.items, "training queries"),
    run.queries.labels,
    run.corpus.num_labels,
    mesh=run.mesh,
  )
  state = create_state(run.abstract, params, run.optimizer)
  state = dataclasses.replace(
    state, label_clusters=padded_like(clusters, state.label_clusters), centroids=padded_like(centroids, state.centroids)
  )
  meta = provenance(run.data_fingerprint, _weight_hashes(run.weights_folder)) | {
    "adapter_sha256": source.weight_hashes(adapter) if adapter else {},
    "config": run.config.to_dict(),
    "train_seconds": 0.0,
    "tokens": 0,
  }
  return Checkpoint(state, None, meta)


def check_base(model: ModelDefinition, weights_folder: Path | None, workdir: Path, meta: dict[str, Any]) -> None:
  """Refuses a frozen encoder that is not the one on which a checkpoint was trained.

  Args:
    model: what is about to be restored.
    weights_folder: of the pretrained encoder; None where it is drawn.
    workdir: that holds the checkpoint.
    meta: of the checkpoint.

  Raises:
    InputError: naming both.
  """
  if not model.freezes_encoder:
    return
  wanted, found = meta["weights_sha256"], _weight_hashes(weights_folder)
  for name in sorted(wanted.keys() | found.keys()):
    if found.get(name) != wanted.get(name):
      raise InputError(
        f"{weights_folder}: {name} has sha256 {found.get(name)}, but what is in {workdir} was trained on "
        f"{meta['config']['encoder']['pretrained']} with {wanted.get(name)}; set config.encoder.pretrained to that"
      )


def cluster_means(embeddings: np.ndarray, clusters: np.ndarray, num_vectors: int, mesh: Mesh) -> jax.Array:
  """Mean embedding of the labels that share each free vector, float32 [C, D]; zeros where none does.

  Args:
    embeddings: plain ones of the labels, [L, D].
    clusters: int32 [L], the free vector of each label.
    num_vectors: C.
    mesh: the devices.
  """
  cluster_of = Ragged.of_lengths(clusters, np.ones(len(clusters), np.int64))
  return label_centroids(embeddings, cluster_of, num_vectors, mesh=mesh)


def _weight_hashes(folder: Path | None) -> dict[str, str]:
  return {} if folder is None else source.weight_hashes(folder)


def _residual_norm(run: Run, params: Tree) -> float:
  """Length of what images add to pooled texts: `fusion.residual` times the mean length of those."""
  sample = run.queries.items.take(np.arange(min(len(run.queries), _NORM_SAMPLE))).first_images(0)
  norm = np.linalg.norm(run.encoder.pooled(params, sample, "texts"), axis=1).mean()
  return norm * run.config.fusion.residual


def _label_clusters(run: Run, params: Tree) -> tuple[np.ndarray, jax.Array | None]:
  """Which free vector each label uses, int [L], and what those begin as, [C, D]; None to leave them as drawn.

  A label has its own where there are enough, else that of its balanced cluster, by the initial model's plain
  embeddings. Where `train.free_vector_init` says so, a vector begins as the mean of the embeddings of its labels.
  """
  num_labels, num_vectors = run.corpus.num_labels, run.config.train.free_vectors
  own, from_embeddings = num_vectors >= num_labels, run.config.train.free_vector_init == "cluster_mean"
  clusters = np.arange(num_labels, dtype=np.int32)
  if own and not from_embeddings:
    return clusters, None
  embeddings = run.encoder.queries(params, run.items["labels"], "labels")
  if not own:
    clusters = balanced_kmeans(embeddings, num_vectors, seed=run.config.seed, mesh=run.mesh)
  if not from_embeddings:
    return clusters, None
  return clusters, cluster_means(embeddings, clusters, num_vectors, run.mesh)
