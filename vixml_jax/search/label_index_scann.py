"""ScaNN of a label index: it is built for a recall, saved, and described in index.json with the recall it has."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.row_files import RowFiles
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.index import make_index
from vixml_jax.search.scann_index import ScannIndex
from vixml_jax.search.scann_recall import QuerySample, RecallGoal, measure_recall


def describe_search(
  embeddings: np.ndarray | RowFiles,
  deleted: np.ndarray,
  scann: ScannIndex | None,
  scann_recall: float,
  sample: QuerySample | None,
  mesh: Mesh | None,
) -> dict[str, Any]:
  """Returns the entries of index.json on the labels and on how they are searched, including the recall of ScaNN.

  Args:
    embeddings: float32 [L, D], embeddings of all labels; in memory if there is ScaNN.
    deleted: bool [L], whether each label is deleted.
    scann: ScaNN over the labels that are not deleted; None for an index of exact search.
    scann_recall: Share of the 100 best labels that ScaNN must find; 0 if nothing was asked for.
    sample: Queries to measure recall on; not needed without ScaNN.
    mesh: Devices to measure recall with; None uses all devices of this process.
  """
  counts = {"num_labels": len(embeddings), "dim": embeddings.shape[1], "num_deleted": int(deleted.sum())}
  if scann is None:
    return counts | {"search": {"kind": "exact", "scann_recall": scann_recall}, "recall": None}
  assert isinstance(embeddings, np.ndarray) and sample is not None
  exact = ExactIndex(embeddings, _local(mesh), rows=np.flatnonzero(~deleted))
  # The settings were chosen on the first half; the recall that is reported is that of other queries.
  recall = measure_recall(scann, exact, sample.halves()[1] if scann_recall else sample)
  search = {"kind": "scann", "scann_recall": scann_recall, "parameters": dataclasses.asdict(scann.parameters)}
  return counts | {"search": search, "recall": recall}


def build_scann(
  embeddings: np.ndarray, rows: np.ndarray | None, goal: RecallGoal | None, mesh: Mesh | None
) -> ScannIndex:
  """Returns ScaNN over labels or training queries.

  Args:
    embeddings: float32 [L, D].
    rows: Ids to search; None searches all.
    goal: Recall to reach; None takes the settings of search by rules of thumb.
    mesh: Devices to measure recall with; None uses all devices of this process.
  """
  scann = make_index("scann", embeddings, _local(mesh), rows, goal=goal)
  assert isinstance(scann, ScannIndex)
  return scann


def _local(mesh: Mesh | None) -> Mesh:
  return Mesh(np.asarray(jax.local_devices()), ("data",)) if mesh is None else mesh


def save_scann(scann: ScannIndex, folder: Path) -> None:
  """Writes ScaNN to a new folder."""
  folder.mkdir()
  scann.save(folder)
