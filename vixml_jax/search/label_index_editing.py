"""Edits of the label index on disk: each adds, deletes or categorizes labels and writes the next snapshot.

An edit is applied to the current snapshot, which another process may have written after the given one was opened. Files
that an edit does not change are hard-linked from the former snapshot.
"""

from collections.abc import Callable, Sequence
import logging
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import locked
from vixml_jax.ragged import Ragged
from vixml_jax.row_files import load_rows
from vixml_jax.search import label_index_blend, snapshots
from vixml_jax.search.label_index_blend import WordVectors
from vixml_jax.search.label_index_files import (
  QUERY_TEXTS,
  WITHOUT_CLASSIFIER,
  IndexContents,
  IndexFiles,
  as_table,
  category_rows,
  open_current,
)
from vixml_jax.search.label_index_scann import build_scann, describe_search, save_scann
from vixml_jax.search.scann_index import ScannIndex
from vixml_jax.search.scann_recall import recall_goal, recall_sample

_ROWS_PER_BLOCK = 65_536
# Adding without queries and deleting leave these as they are.
_KEPT_FILES = (
  label_index_blend.MODEL,
  label_index_blend.IDF,
  WITHOUT_CLASSIFIER,
  "clusters.npy",
  "held_out.npy",
  "queries.npy",
  "query_labels.values.npy",
  "query_labels.offsets.npy",
  f"{QUERY_TEXTS}.values.npy",
  f"{QUERY_TEXTS}.offsets.npy",
  "query_words.values.npy",
  "query_words.offsets.npy",
  "query_words.weights.npy",
  "scann_queries",
)

_log = logging.getLogger(__name__)


def add_labels(
  files: IndexFiles, new: IndexContents, words: WordVectors | None, delete: np.ndarray, mesh: Mesh | None
) -> None:
  """Adds labels; their ids follow those of the labels that exist.

  Args:
    files: A snapshot of the index.
    new: The n new labels. Their training queries have labels 0 to n - 1, which refer to the new labels.
    words: TF-IDF vectors of the new labels and of their training queries, which an index with a blend needs.
    delete: Ids of labels to delete in the same step.
    mesh: Devices to measure the recall of ScaNN with; None uses all devices of this process.

  Raises:
    InputError: A uid belongs to another label, an id to delete does not exist, or no label would remain.
  """
  dim = files.embeddings.shape[1]
  if new.embeddings.shape[1:] != (dim,):
    raise ValueError(f"embeddings have shape {new.embeddings.shape} instead of [n, {dim}]")
  if files.blend is not None and words is None:
    raise ValueError("an index with a blend needs the words of new labels")
  if files.query_texts is not None and new.queries is not None and new.query_texts is None:
    raise ValueError("an index with texts of training queries needs those of new ones")
  _write_next(files, lambda latest, work: _write_added(latest, work, new, words, delete, mesh))


def delete_labels(files: IndexFiles, ids: np.ndarray, mesh: Mesh | None) -> None:
  """Deletes labels; their ids are not reused.

  Args:
    files: A snapshot of the index.
    ids: Ids of labels.
    mesh: Devices to measure the recall of ScaNN with; None uses all devices of this process.

  Raises:
    InputError: An id does not exist, or no label would remain.
  """
  _write_next(files, lambda latest, work: _write_deleted(latest, work, ids, mesh))


def set_categories(files: IndexFiles, ids: np.ndarray, categories: Sequence[Sequence[str]]) -> None:
  """Replaces the categories of labels.

  Args:
    files: A snapshot of the index.
    ids: Ids of labels, each once.
    categories: Names of the categories of each of them.

  Raises:
    InputError: An id does not exist.
  """
  _write_next(files, lambda latest, work: _write_categories(latest, work, ids, categories))


def _write_next(files: IndexFiles, write: Callable[[IndexFiles, Path], dict[str, Any]]) -> None:
  """Writes the next snapshot from the current one.

  Args:
    files: A snapshot of the index.
    write: Function of the current snapshot and the new folder that writes the files and returns the new index.json.
  """
  with locked(files.folder / snapshots.LOCK):
    current = files
    if snapshots.read_current(files.folder).path != files.snapshot.path:
      current = open_current(files.folder, lambda opened: opened, checkpoint=files.info["checkpoint"], verify=False)
    snapshots.write_snapshot(files.folder, lambda work: write(current, work), current.snapshot)


def _write_added(
  files: IndexFiles, work: Path, new: IndexContents, words: WordVectors | None, delete: np.ndarray, mesh: Mesh | None
) -> dict[str, Any]:
  deleted = _deleted_after(files, delete)
  uids, embeddings = as_table(new.uids), load_rows(new.embeddings)
  if (duplicate := uids.first_duplicate()) is not None:
    raise InputError(f"label uid {duplicate!r} is used by two new labels; every label needs its own")
  names_of_new = uids.take(np.arange(len(uids)))
  for uid, label in zip(names_of_new, files.uids.find(names_of_new), strict=True):
    if label >= 0 and not deleted[label]:
      raise InputError(
        f"label {uid!r} is already in {files.folder}; delete it first, or give the new label another uid"
      )
  rows = new.categories if new.categories is not None else [()] * len(new.uids)
  categories, names = _append_categories(files, rows)
  if names:
    categories.save(work / "categories")
  _save_concatenated(work / "labels.npy", files.embeddings, embeddings)
  np.save(work / "label_clusters.npy", np.concatenate([files.label_clusters, new.label_clusters]))
  files.texts.rows.followed_by(as_table(new.texts).rows).save(work / "texts")
  files.uids.rows.followed_by(uids.rows).save(work / "uids")
  deleted = np.concatenate([deleted, np.zeros(len(new.uids), bool)])
  _check_any_left(files.folder, deleted)
  if new.queries is not None and new.query_labels is not None:
    _write_added_queries(files, work, new, mesh)
  if files.blend is not None and words is not None:
    _write_added_words(files.blend.words, work, words)
    if files.blend.classifiers is not None:
      classifiers = load_rows(files.blend.classifiers)
      unknown = np.full((len(new.uids), classifiers.shape[1]), np.nan, np.float32)
      _save_concatenated(work / label_index_blend.CLASSIFIERS, classifiers, unknown)

  def edit_scann(scann: ScannIndex) -> None:
    scann.delete(delete)
    scann.add(embeddings, np.arange(files.num_labels, len(deleted)))

  info = _finish(files, work, deleted, edit_scann, mesh)
  return info | {"categories": names if names or files.categories is not None else None}


def _write_added_queries(files: IndexFiles, work: Path, new: IndexContents, mesh: Mesh | None) -> None:
  """Appends training queries, whose labels are counted from the first new one, if the index has training queries."""
  assert new.queries is not None and new.query_labels is not None
  if files.queries is None or files.query_labels is None:
    return
  queries, labels = load_rows(new.queries), new.query_labels
  _save_concatenated(work / "queries.npy", files.queries, queries)
  if files.query_texts is not None and new.query_texts is not None:
    files.query_texts.rows.followed_by(as_table(new.query_texts).rows).save(work / QUERY_TEXTS)
  labels = Ragged((labels.values + files.num_labels).astype(np.int32), labels.offsets)
  files.query_labels.followed_by(labels).save(work / "query_labels")
  stored = files.snapshot.path / "scann_queries"
  if not stored.exists():
    return
  scann = ScannIndex.load(stored)
  scann.add(queries, np.arange(len(files.queries), len(files.queries) + len(queries)))
  if scann.needs_rebuild:
    joined = np.load(work / "queries.npy", mmap_mode="r", allow_pickle=False)
    scann = build_scann(joined, None, files.recall_goal, mesh)
  save_scann(scann, work / "scann_queries")


def _write_added_words(former: WordVectors, work: Path, new: WordVectors) -> None:
  """Appends the words of new labels and of their training queries."""
  label_index_blend.save_vectors(
    label_index_blend.joined(former.labels, new.labels), work / label_index_blend.LABEL_WORDS
  )
  if new.queries.shape[0]:
    label_index_blend.save_vectors(
      label_index_blend.joined(former.queries, new.queries), work / label_index_blend.QUERY_WORDS
    )


def _write_deleted(files: IndexFiles, work: Path, ids: np.ndarray, mesh: Mesh | None) -> dict[str, Any]:
  deleted = _deleted_after(files, ids)
  _check_any_left(files.folder, deleted)
  for name in _names(files) - {"deleted.npy", "scann", *_KEPT_FILES}:
    snapshots.link_or_copy(files.snapshot.path / name, work / name)
  return _finish(files, work, deleted, lambda scann: scann.delete(ids), mesh)


def _write_categories(files: IndexFiles, work: Path, ids: np.ndarray, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
  _check_ids(files, ids)
  categories, names = _append_categories(files, rows)
  source = np.arange(files.num_labels)
  source[ids] = files.num_labels + np.arange(len(ids))
  categories.take(source).save(work / "categories")
  for name in _names(files):
    if not name.startswith("categories."):
      snapshots.link_or_copy(files.snapshot.path / name, work / name)
  return files.info | {"edits": files.info["edits"] + 1, "categories": names}


def _finish(
  files: IndexFiles, work: Path, deleted: np.ndarray, edit_scann: Callable[[ScannIndex], None], mesh: Mesh | None
) -> dict[str, Any]:
  """Writes what adding and deleting have in common, after labels.npy was written, and returns index.json."""
  np.save(work / "deleted.npy", deleted)
  for name in _KEPT_FILES:
    if (files.snapshot.path / name).exists() and not (work / name).exists():
      snapshots.link_or_copy(files.snapshot.path / name, work / name)
  embeddings = np.load(work / "labels.npy", mmap_mode="r", allow_pickle=False)
  scann, sample = None, None
  if files.has_scann:
    sample = recall_sample(embeddings, deleted, files.queries, files.held_out)
    scann = ScannIndex.load(files.snapshot.path / "scann")
    edit_scann(scann)
    if scann.needs_rebuild:
      _log.info("%s: over a tenth of the labels changed since ScaNN was built; rebuilding it", files.folder)
      scann = build_scann(embeddings, np.flatnonzero(~deleted), recall_goal(files.scann_recall, sample), mesh)
    save_scann(scann, work / "scann")
  described = describe_search(embeddings, deleted, scann, files.scann_recall, sample, mesh)
  return files.info | {"edits": files.info["edits"] + 1} | described


def _names(files: IndexFiles) -> set[str]:
  """Returns the names of the files and folders of the snapshot."""
  return {path.split("/")[0] for path in files.info["files"]}


def _deleted_after(files: IndexFiles, ids: np.ndarray) -> np.ndarray:
  """Returns bool [L], whether each label is deleted once these are deleted as well."""
  _check_ids(files, ids)
  deleted = files.deleted.copy()
  deleted[ids] = True
  return deleted


def _append_categories(files: IndexFiles, rows: Sequence[Sequence[str]]) -> tuple[Ragged, list[str]]:
  """Returns the categories of all labels followed by more rows, as positions in a new list of names, and that list."""
  names = sorted({*files.category_names, *(name for row in rows for name in row)})
  if files.categories is None:
    former = Ragged.of_lengths(np.zeros(0, np.int32), np.zeros(files.num_labels, np.int64))
  else:
    positions = {name: position for position, name in enumerate(names)}
    moved_to = np.asarray([positions[name] for name in files.category_names], np.int32)
    former = Ragged(moved_to[files.categories.values], files.categories.offsets)
  return former.followed_by(category_rows(rows, names)), names


def _check_ids(files: IndexFiles, ids: np.ndarray) -> None:
  wrong = ids[(ids < 0) | (ids >= files.num_labels)]
  if len(wrong):
    raise InputError(f"{files.folder}: there is no label {wrong[0]}; ids are from 0 to {files.num_labels - 1}")


def _check_any_left(folder: Path, deleted: np.ndarray) -> None:
  if deleted.all():
    raise InputError(f"{folder}: no label would remain; keep at least one")


def _save_concatenated(path: Path, first: np.ndarray, second: np.ndarray) -> None:
  """Writes the rows of both arrays to one file, without holding them in memory."""
  joined = np.lib.format.open_memmap(
    path, mode="w+", dtype=np.float32, shape=(len(first) + len(second), first.shape[1])
  )
  for start in range(0, len(first), _ROWS_PER_BLOCK):
    part = first[start : start + _ROWS_PER_BLOCK]
    joined[start : start + len(part)] = part
  joined[len(first) :] = second
  joined.flush()
