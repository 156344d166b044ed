"""Writes into a workdir what inference needs besides the checkpoint: tokenizer, origin of the features, label index."""

import logging
import os
from pathlib import Path
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from vixml_jax import sharding
from vixml_jax.datasets.records import Records
from vixml_jax.files import new_folder, sha256_of_file, write_json
from vixml_jax.images.feature_set import open_features
from vixml_jax.run.checkpoint import checkpoint_id
from vixml_jax.run.from_config import Run
from vixml_jax.run.workdir import CHECKPOINTS, INDEX, INFERENCE_INFO, TOKENIZER
from vixml_jax.search.label_index import IndexContents, is_edited, write_index
from vixml_jax.weights import source

_log = logging.getLogger(__name__)

# Of a pretrained folder: all that decides token ids, and the config that says whose tokenizer it is.
_TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
  "config.json",
)


def write_inference_files(
  run: Run,
  step: int,
  retrieval: dict[str, Any] | None,
  prototypes: np.ndarray,
  label_clusters: np.ndarray,
  cluster_means: np.ndarray,
  train_embeddings: np.ndarray,
) -> None:
  """Writes `tokenizer/`, `inference.json` and `index/`; the first process writes, the others wait for it.

  An index of the same checkpoint to which labels were added, or from which some were deleted, is left as it is.

  Args:
    run: the run.
    step: of the checkpoint that holds the model.
    retrieval: lambda, temperature and hits of retrieval-augmented inference; None leaves out the training queries.
    prototypes: float32 [L, D], of all labels, with all training queries known.
    label_clusters: int32 [L], the free vector of each label.
    cluster_means: float32 [C, D], mean plain embedding of the labels that share a free vector.
    train_embeddings: float32 [N, D], of all training queries.
  """
  if jax.process_index() == 0:
    checkpoint = checkpoint_id(run.workdir / CHECKPOINTS, step)
    tokenizer_hashes = _copy_tokenizer(source.resolve(run.config.encoder.pretrained), run.workdir / TOKENIZER)
    write_json(run.workdir / INFERENCE_INFO, {"tokenizer_sha256": tokenizer_hashes, "image_features": _origin(run)})
    if is_edited(run.workdir / INDEX, checkpoint):
      _log.warning(
        "%s: labels were added to it or deleted; it is left as it is. Delete it to have it written again",
        run.workdir / INDEX,
      )
    else:
      texts, uids = _label_names(run)
      contents = IndexContents(
        prototypes,
        texts,
        uids,
        label_clusters,
        cluster_means,
        queries=train_embeddings if retrieval else None,
        query_labels=run.corpus.train_labels if retrieval else None,
      )
      # This process alone is here, so the index is measured on its own devices.
      write_index(
        run.workdir / INDEX,
        contents,
        checkpoint=checkpoint,
        search=run.config.eval.search,
        retrieval=retrieval,
        mesh=sharding.make_mesh(devices=jax.local_devices()),
      )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("inference files written")


def _copy_tokenizer(pretrained: Path, target: Path) -> dict[str, str]:
  """Copies the tokenizer's files and returns their sha256 by name."""
  names = [name for name in _TOKENIZER_FILES if (pretrained / name).is_file()]
  hashes = {name: sha256_of_file(pretrained / name) for name in names}
  if not target.is_dir() or hashes != {path.name: sha256_of_file(path) for path in target.iterdir()}:
    shutil.rmtree(target, ignore_errors=True)
    with new_folder(target) as work:
      for name in names:
        shutil.copyfile(pretrained / name, work / name)
  return hashes


def _origin(run: Run) -> dict[str, Any] | None:
  """How the image features were made, with what: queries with pictures need the same."""
  if run.bank is None:
    return None
  data, wanted = run.config.dataset, run.config.features
  metadata = open_features(run.corpus.builder, data.data_dir, wanted.name).metadata
  keys = ("checkpoint", "checkpoint_sha256", "variant", "preprocessing", "dtype", "dim")
  origin = {key: metadata[key] for key in keys if key in metadata}
  # A relative path means something only where this process was started.
  if os.path.exists(origin.get("checkpoint", "")):
    origin["checkpoint"] = os.path.abspath(origin["checkpoint"])
  return origin


def _label_names(run: Run) -> tuple[list[str], list[str]]:
  """Texts and uids of all labels."""
  texts, uids = [], []
  for batch in Records(run.corpus.builder, "labels").batches():
    texts += [record.text(run.corpus.text_fields) for record in batch]
    uids += [record.text(("uid",)) for record in batch]
  return texts, uids
