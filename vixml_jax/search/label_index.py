"""The label index on disk: embeddings, texts and uids of all labels, what searches them, and the training queries.

A workdir's `index/` holds snapshots (see `snapshots`), each a folder of
  index.json            format, checkpoint, search, counts, recall of ScaNN, retrieval augmentation, sha256 of each file
  labels.npy            float32 [L, D], the prototypes; the row is the label's id, which is never used again
  deleted.npy           bool [L]
  texts, uids           UTF-8 of each label, as ragged rows of uint8
  label_clusters.npy    int32 [L], the free vector of each label
  clusters.npy          float32 [C, D], mean plain embedding of the labels of each; a zero row for none
  categories            ragged int32, the categories of each label, whose names stand in index.json; may be absent
  queries.npy           float32 [N, D], training queries; and query_labels, ragged int32, their labels; may be absent
  scann, scann_queries  ScaNN over labels and training queries, where it was asked for
Whatever can be is memory-mapped, so that a million labels cost no objects.
"""

from collections.abc import Sequence
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, Self

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import locked
from vixml_jax.ragged import Ragged
from vixml_jax.search import snapshots
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.filters import Filters, IdSets, search_filtered
from vixml_jax.search.index import KINDS, Index, make_index
from vixml_jax.search.membership import overlap
from vixml_jax.search.scann_index import ScannIndex
from vixml_jax.search.text_table import TextTable

FORMAT = 1
RECALL_AT = (10, 100)
_RECALL_QUERIES = 1_000
_ROWS_AT_ONCE = 65_536
_QUERIES = ("queries.npy", "query_labels.values.npy", "query_labels.offsets.npy", "scann_queries")
_UNCHANGED = ("clusters.npy", *_QUERIES)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class IndexContents:
  """What an index is made of.

  Attributes:
    embeddings: float32 [L, D], the labels' prototypes.
    texts: L texts, to be shown.
    uids: L distinct names, by which users call labels.
    label_clusters: int32 [L], the free vector of each label.
    cluster_means: float32 [C, D], mean plain embedding of the labels of each free vector.
    deleted: bool [L]; None for none.
    queries: float32 [N, D], embeddings of the training queries, for retrieval augmentation.
    query_labels: their labels, N rows.
    categories: names of the categories of each label.
  """

  embeddings: np.ndarray
  texts: Sequence[str]
  uids: Sequence[str]
  label_clusters: np.ndarray
  cluster_means: np.ndarray
  deleted: np.ndarray | None = None
  queries: np.ndarray | None = None
  query_labels: Ragged | None = None
  categories: Sequence[Sequence[str]] | None = None

  def __post_init__(self):
    counts = {
      name: len(value)
      for name in ("embeddings", "texts", "uids", "label_clusters", "deleted", "categories")
      if (value := getattr(self, name)) is not None
    }
    if len(set(counts.values())) > 1:
      raise ValueError(f"different numbers of labels: {counts}")
    numbers = [-1 if part is None else len(part) for part in (self.queries, self.query_labels)]
    if numbers[0] != numbers[1]:
      raise ValueError("training queries and their labels come together, in equal numbers")


def write_index(
  folder: str | Path,
  contents: IndexContents,
  *,
  checkpoint: dict[str, Any],
  search: str,
  retrieval: dict[str, Any] | None = None,
  mesh: Mesh | None = None,
) -> None:
  """Writes an index in the place of whatever is in the folder; it appears whole or not at all.

  With search="scann" ScaNN is built, over the training queries too, and its recall against exact search is measured,
  logged and stored.

  Args:
    folder: `index/` of a workdir; one process writes it.
    contents: what it is made of.
    checkpoint: step and sha256 of the model that the embeddings are of.
    search: "exact" or "scann".
    retrieval: lambda, temperature and hits of retrieval-augmented inference; None where it is not meant to be used.
    mesh: devices of this process to measure recall with; None takes all of this process.

  Raises:
    InputError: two labels share a uid, ScaNN cannot run here, or the folder cannot be written to.
  """
  if search not in KINDS:
    raise InputError(f"search={search!r} is not known: use one of {', '.join(KINDS)}")
  folder = Path(folder)
  uids = TextTable.of(contents.uids)
  if (twice := uids.repeated()) is not None:
    raise InputError(f"label uid {twice!r} stands for two labels; every label needs its own")
  deleted = np.zeros(len(uids), bool) if contents.deleted is None else np.asarray(contents.deleted, bool)
  embeddings = np.asarray(contents.embeddings, np.float32)
  names = sorted({name for row in contents.categories or () for name in row})

  def fill(work: Path) -> dict[str, Any]:
    np.save(work / "labels.npy", embeddings)
    np.save(work / "deleted.npy", deleted)
    np.save(work / "label_clusters.npy", np.asarray(contents.label_clusters, np.int32))
    np.save(work / "clusters.npy", np.asarray(contents.cluster_means, np.float32))
    TextTable.of(contents.texts).rows.save(work / "texts")
    uids.rows.save(work / "uids")
    if contents.categories is not None:
      _numbered(contents.categories, names).save(work / "categories")
    if contents.queries is not None and contents.query_labels is not None:
      np.save(work / "queries.npy", np.asarray(contents.queries, np.float32))
      contents.query_labels.save(work / "query_labels")
    scann = None
    if search == "scann":
      scann = ScannIndex(embeddings, rows=np.flatnonzero(~deleted))
      _save(scann, work / "scann")
      if contents.queries is not None:
        _save(ScannIndex(contents.queries), work / "scann_queries")
    return {
      "format": FORMAT,
      "checkpoint": checkpoint,
      "edits": 0,
      "retrieval": retrieval,
      "categories": None if contents.categories is None else names,
      **_counts(embeddings, deleted),
      **_search_info(search, scann, embeddings, deleted, contents.queries, mesh),
    }

  with locked(folder / snapshots.LOCK):
    snapshots.write_snapshot(folder, fill)


def is_edited(folder: str | Path, checkpoint: dict[str, Any]) -> bool:
  """Whether there is an index of this checkpoint to which labels were added or from which some were deleted."""
  try:
    _, info = snapshots.read_current(Path(folder))
  except InputError:
    return False
  return info.get("format") == FORMAT and info["checkpoint"] == checkpoint and info["edits"] > 0


class LabelIndex:
  """An index on disk, opened: one snapshot, which stays as it is. `add` and `delete` write the next and return it.

  Attributes:
    folder: `index/` of a workdir.
    info: what index.json says.
    embeddings: float32 [L, D], memory-mapped; deleted labels included.
    deleted: bool [L].
    label_clusters: int32 [L].
    cluster_means: float32 [C, D].
    search_kind: "exact" or "scann", how it searches.
  """

  def __init__(self, folder: Path, snapshot: Path, info: dict[str, Any], search: str, mesh: Mesh | None):
    """Maps the files; use `open`."""
    mapped = lambda name: np.load(snapshot / name, mmap_mode="r", allow_pickle=False)
    self.folder, self.info = folder, info
    self.embeddings = mapped("labels.npy")
    self.deleted = np.asarray(mapped("deleted.npy"))
    self.label_clusters, self.cluster_means = mapped("label_clusters.npy"), mapped("clusters.npy")
    self.search_kind, self._snapshot, self._mesh = search, snapshot, mesh
    self._texts, self._uids = (TextTable(Ragged.load(snapshot / name)) for name in ("texts", "uids"))
    self._categories = None if info["categories"] is None else Ragged.load(snapshot / "categories")
    self._queries = mapped("queries.npy") if "queries.npy" in info["files"] else None
    self._all_query_labels = None if self._queries is None else Ragged.load(snapshot / "query_labels")
    if search == "scann":
      _ = self.label_index  # Now, since its files go when the next snapshot comes.

  @classmethod
  def open(
    cls,
    folder: str | Path,
    *,
    checkpoint: dict[str, Any] | None,
    search: str | None = None,
    mesh: Mesh | None = None,
    verify: bool = True,
  ) -> Self:
    """Opens the valid snapshot.

    Args:
      folder: `index/` of a workdir.
      checkpoint: step and sha256 of the model that will encode queries; None takes an index of any model.
      search: "exact" or "scann"; None searches as it was written for. Where ScaNN is asked for and not stored, it is
        built in memory.
      mesh: devices of the exact search; None takes all of them.
      verify: whether to compare the sha256 of every file, reading all of them; otherwise their sizes are compared.

    Raises:
      InputError: there is no index, a file is missing or damaged, it is of another format or another checkpoint, or
        ScaNN was asked for and cannot run here.
    """
    folder = Path(folder)
    while True:
      snapshot, info = snapshots.read_current(folder)
      try:
        _check_info(folder, info, checkpoint)
        snapshots.check_files(snapshot, info["files"], contents=verify)
        return cls(folder, snapshot, info, search or info["search"]["kind"], mesh)
      except (OSError, ValueError) as error:  # InputError is one, too.
        # It may have been replaced, and removed, in the meantime.
        if snapshots.read_current(folder)[0] == snapshot:
          if isinstance(error, InputError):
            raise
          raise InputError(f"{snapshot}: cannot be read ({error}); {snapshots.remedy(folder)}") from error

  @property
  def num_labels(self) -> int:
    """L, deleted labels included: ids are below."""
    return len(self.embeddings)

  @property
  def num_live(self) -> int:
    """How many labels are not deleted."""
    return int(np.sum(~self.deleted))

  @property
  def dim(self) -> int:
    """D."""
    return self.embeddings.shape[1]

  @property
  def retrieval(self) -> dict[str, Any] | None:
    """Lambda, temperature and hits of retrieval-augmented inference; None where it is not meant to be used."""
    return self.info["retrieval"]

  @property
  def categories(self) -> list[str]:
    """Names of all categories."""
    return self.info["categories"] or []

  @functools.cached_property
  def label_index(self) -> Index:
    """Of the labels that are not deleted; what it finds are ids."""
    if self.search_kind == "scann" and self.info["search"]["kind"] == "scann":
      return ScannIndex.load(self._snapshot / "scann")
    live = np.flatnonzero(~self.deleted) if self.deleted.any() else None
    return make_index(self.search_kind, self.embeddings, self._mesh, live)

  @functools.cached_property
  def query_index(self) -> Index:
    """Of the training queries. With ScaNN, read it once before a next snapshot removes its files.

    Raises:
      InputError: the index was written without training queries.
    """
    queries = self._stored_queries()
    if self.search_kind == "scann" and self.info["search"]["kind"] == "scann":
      return ScannIndex.load(self._snapshot / "scann_queries")
    return make_index(self.search_kind, queries, self._mesh)

  @functools.cached_property
  def query_labels(self) -> Ragged:
    """Labels of the training queries, without deleted ones, N rows."""
    self._stored_queries()
    rows = self._all_query_labels
    assert rows is not None  # They come with the queries.
    kept = ~self.deleted[rows.values]
    if kept.all():
      return rows
    return Ragged.of_lengths(rows.values[kept], np.bincount(rows.row_ids()[kept], minlength=len(rows)))

  def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Texts of labels, deleted or not."""
    return self._texts.take(ids)

  def uids(self, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Uids of labels, deleted or not."""
    return self._uids.take(ids)

  def ids_of(self, uids: Sequence[str]) -> np.ndarray:
    """int32 ids of labels.

    Raises:
      InputError: naming a uid that is unknown or whose label was deleted.
    """
    ids = self._known_ids(uids)
    for uid, gone in zip(uids, self.deleted[ids], strict=True):
      if gone:
        raise InputError(f"label {uid!r} was deleted from {self.folder}")
    return ids

  def filters(
    self,
    allow: Sequence[Sequence[str] | None] | None = None,
    deny: Sequence[Sequence[str] | None] | None = None,
    categories: Sequence[Sequence[str] | None] | None = None,
  ) -> Filters:
    """Filters by names, for `search`.

    A query that has both allowed labels and categories may have the allowed labels that are in one of the categories
    at least. Uids of deleted labels are taken, and find nothing.

    Args:
      allow: for each query the uids that it may have, or None for all; an empty list allows none.
      deny: for each query the uids that it may not have.
      categories: for each query the categories whose labels it may have, or None for all.

    Raises:
      InputError: naming a uid or category that is unknown.
    """
    num_queries = next((len(part) for part in (allow, categories) if part is not None), 0)
    nothing = [None] * num_queries
    keys = [
      None
      if uids is None and names is None
      else (uids if uids is None else tuple(uids), names if names is None else tuple(names))
      for uids, names in zip(allow or nothing, categories or nothing, strict=True)
    ]
    return Filters(
      _shared_sets(keys, lambda key: self._allowed(*key)),
      _shared_sets([tuple(uids) if uids else None for uids in deny or ()], self._known_ids),
    )

  def search(
    self, queries: np.ndarray | jax.Array, k: int, filters: Filters | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels of each query, of those that are not deleted and that its filter allows.

    Args:
      queries: float32 [Q, D].
      k: how many, at least 1.
      filters: which labels each query may have; see `filters`. `search_filtered` says how they are kept to.

    Returns:
      scores float32 [Q, K] in descending order and ids int32 [Q, K]; score -inf and id -1 where fewer are left.
    """
    if filters is None or (filters.allow is None and filters.deny is None):
      return self.label_index.search(queries, k)
    queries = np.asarray(queries, np.float32)
    return search_filtered(self.label_index, self.embeddings, ~self.deleted, queries, k, filters)

  def add(
    self,
    embeddings: np.ndarray,
    texts: Sequence[str],
    uids: Sequence[str],
    label_clusters: np.ndarray,
    categories: Sequence[Sequence[str]] | None = None,
    *,
    queries: np.ndarray | None = None,
    query_labels: Ragged | None = None,
    delete: Sequence[int] | np.ndarray = (),
  ) -> "LabelIndex":
    """Adds labels, into ScaNN too where it is stored, and measures its recall again.

    Their ids follow those of the labels that are there: the last `len(uids)` below `num_labels` of what is returned.

    Args:
      embeddings: float32 [n, D], prototypes.
      texts: n texts.
      uids: n names.
      label_clusters: int32 [n].
      categories: names of the categories of each; None for none.
      queries: float32 [m, D], embeddings of queries that have these labels; an index without training queries, which
        is not meant for retrieval augmentation, leaves them out.
      query_labels: of each of them the new labels that it has, 0 to n - 1.
      delete: ids of labels to delete in the same step, such as those that new ones replace.

    Returns:
      the next snapshot, which is on disk.

    Raises:
      InputError: a uid stands for a label already, there is no such id to delete, or no label would be left.
    """
    new = IndexContents(
      np.asarray(embeddings, np.float32),
      texts,
      uids,
      np.asarray(label_clusters, np.int32),
      self.cluster_means,
      categories=categories,
      queries=queries,
      query_labels=query_labels,
    )
    if new.embeddings.shape[1:] != (self.dim,):
      raise ValueError(f"embeddings have shape {new.embeddings.shape} instead of [n, {self.dim}]")
    doomed = np.asarray(delete, np.int64)
    return self._edit(
      lambda latest, work: latest._write_added(work, new, doomed), _QUERIES if queries is not None else ()
    )

  def delete(self, ids: Sequence[int] | np.ndarray) -> "LabelIndex":
    """Deletes labels, for good; their ids are not used again, their uids may be.

    Args:
      ids: of labels.

    Returns:
      the next snapshot, which is on disk.

    Raises:
      InputError: there is no such id, or no label would be left.
    """
    ids = np.asarray(ids, np.int64)
    return self._edit(lambda latest, work: latest._write_deleted(work, ids))

  def categorize(self, ids: Sequence[int] | np.ndarray, categories: Sequence[Sequence[str]]) -> "LabelIndex":
    """Says in which categories labels are, in the place of those that they were in.

    Args:
      ids: of labels, each once.
      categories: names of the categories of each; none to take it out of all.

    Returns:
      the next snapshot, which is on disk.

    Raises:
      InputError: there is no such id.
    """
    ids = np.asarray(ids, np.int64)
    return self._edit(lambda latest, work: latest._write_categories(work, ids, categories))

  def _stored_queries(self) -> np.ndarray:
    if self._queries is None:
      raise InputError(
        f"{self.folder}: was written without the training queries, which retrieval-augmented inference "
        f"needs; {snapshots.remedy(self.folder)} with --retrieval_augmented"
      )
    return self._queries

  def _known_ids(self, uids: Sequence[str]) -> np.ndarray:
    ids = self._uids.find(uids)
    for uid, label in zip(uids, ids, strict=True):
      if label < 0:
        raise InputError(
          f"label {uid!r} is not in {self.folder}; uids are those of the data set's labels and of "
          "labels that were added"
        )
    return ids

  @functools.cached_property
  def _labels_of_categories(self) -> dict[str, np.ndarray]:
    if self._categories is None:
      return {}
    members = self._categories.transpose(len(self.categories))
    return {name: members[number] for number, name in enumerate(self.categories)}

  def _allowed(self, uids: tuple[str, ...] | None, names: tuple[str, ...] | None) -> np.ndarray:
    """Ids that are among the uids and in one of the categories at least; None is no condition, but not for both."""
    if names is None:
      return self._known_ids(uids or ())
    for name in names:
      if name not in self._labels_of_categories:
        known = ", ".join(self.categories[:10]) or "none"
        raise InputError(
          f"category {name!r} is not in {self.folder}, which has {len(self.categories)}: {known}"
          f"{', ...' if len(self.categories) > 10 else ''}"
        )
    members = functools.reduce(np.union1d, (self._labels_of_categories[name] for name in names), np.zeros(0, np.int32))
    return members if uids is None else np.intersect1d(members, self._known_ids(uids))

  def _edit(self, write, changed: Sequence[str] = ()) -> "LabelIndex":
    """Writes the next snapshot on top of the latest one, which another process may have written.

    Of `_UNCHANGED`, `changed` are changed after all.
    """
    with locked(self.folder / snapshots.LOCK):
      snapshot, _ = snapshots.read_current(self.folder)
      latest = self if snapshot == self._snapshot else self._reopened()
      known = {
        name: described
        for name, described in latest.info["files"].items()
        if name.split("/")[0] in _UNCHANGED and name.split("/")[0] not in changed
      }
      snapshots.write_snapshot(self.folder, lambda work: write(latest, work), known)
    return self._reopened()

  def _reopened(self) -> "LabelIndex":
    return LabelIndex.open(
      self.folder, checkpoint=self.info["checkpoint"], search=self.search_kind, mesh=self._mesh, verify=False
    )

  def _write_added(self, work: Path, new: IndexContents, doomed: np.ndarray) -> dict[str, Any]:
    deleted = self._deleted_with(doomed)
    uids = TextTable.of(new.uids)
    if (twice := uids.repeated()) is not None:
      raise InputError(f"label uid {twice!r} stands for two new labels; every label needs its own")
    there = self._uids.find(new.uids)
    for uid, label in zip(new.uids, there, strict=True):
      if label >= 0 and not deleted[label]:
        raise InputError(f"label {uid!r} is in {self.folder} already; delete it first, or give the new one another uid")
    rows = new.categories if new.categories is not None else [()] * len(new.uids)
    categories, names = self._categories_followed_by(rows)
    if names:
      categories.save(work / "categories")
    _save_joined(work / "labels.npy", self.embeddings, new.embeddings)
    np.save(work / "label_clusters.npy", np.concatenate([self.label_clusters, new.label_clusters]))
    self._texts.rows.followed_by(TextTable.of(new.texts).rows).save(work / "texts")
    self._uids.rows.followed_by(uids.rows).save(work / "uids")
    deleted = np.concatenate([deleted, np.zeros(len(new.uids), bool)])
    _check_left(self.folder, deleted)
    if new.queries is not None and new.query_labels is not None:
      self._write_queries(work, new.queries, new.query_labels)

    def change(scann: ScannIndex) -> None:
      scann.delete(doomed)
      scann.add(new.embeddings, np.arange(self.num_labels, len(deleted)))

    return self._finish(work, deleted, change) | {
      "categories": names if names or self._categories is not None else None
    }

  def _write_queries(self, work: Path, queries: np.ndarray, labels: Ragged) -> None:
    """The training queries, if there are any, and more, whose labels are numbered from the first new one."""
    if self._queries is None or self._all_query_labels is None:
      return
    _save_joined(work / "queries.npy", self._queries, queries)
    labels = Ragged((labels.values + self.num_labels).astype(np.int32), labels.offsets)
    self._all_query_labels.followed_by(labels).save(work / "query_labels")
    if not (self._snapshot / "scann_queries").exists():
      return
    scann = ScannIndex.load(self._snapshot / "scann_queries")
    scann.add(queries, np.arange(len(self._queries), len(self._queries) + len(queries)))
    if scann.needs_rebuild:
      scann = ScannIndex(np.load(work / "queries.npy", mmap_mode="r", allow_pickle=False))
    _save(scann, work / "scann_queries")

  def _deleted_with(self, ids: np.ndarray) -> np.ndarray:
    """bool [L], the labels that are deleted when these are, too."""
    self._check_ids(ids)
    deleted = self.deleted.copy()
    deleted[ids] = True
    return deleted

  def _categories_followed_by(self, rows: Sequence[Sequence[str]]) -> tuple[Ragged, list[str]]:
    """The categories of all labels and of more rows, and the names that they number."""
    names = sorted({*self.categories, *(name for row in rows for name in row)})
    empty = Ragged.of_lengths(np.zeros(0, np.int32), np.zeros(self.num_labels, np.int64))
    old = empty if self._categories is None else _renumbered(self._categories, self.categories, names)
    return old.followed_by(_numbered(rows, names)), names

  def _check_ids(self, ids: np.ndarray) -> None:
    wrong = ids[(ids < 0) | (ids >= self.num_labels)]
    if len(wrong):
      raise InputError(f"{self.folder}: there is no label {wrong[0]}; ids go from 0 to {self.num_labels - 1}")

  def _write_categories(self, work: Path, ids: np.ndarray, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    self._check_ids(ids)
    categories, names = self._categories_followed_by(rows)
    order = np.arange(self.num_labels)
    order[ids] = self.num_labels + np.arange(len(ids))
    categories.take(order).save(work / "categories")
    for name in {name.split("/")[0] for name in self.info["files"]}:
      if not name.startswith("categories."):
        snapshots.take_over(self._snapshot / name, work / name)
    return self.info | {"edits": self.info["edits"] + 1, "categories": names}

  def _write_deleted(self, work: Path, ids: np.ndarray) -> dict[str, Any]:
    deleted = self._deleted_with(ids)
    _check_left(self.folder, deleted)
    for name in {name.split("/")[0] for name in self.info["files"]} - {"deleted.npy", "scann", *_UNCHANGED}:
      snapshots.take_over(self._snapshot / name, work / name)
    return self._finish(work, deleted, lambda scann: scann.delete(ids))

  def _finish(self, work: Path, deleted: np.ndarray, change) -> dict[str, Any]:
    """Writes what adding and deleting have in common; `labels.npy` is there."""
    np.save(work / "deleted.npy", deleted)
    for name in _UNCHANGED:
      if (self._snapshot / name).exists() and not (work / name).exists():
        snapshots.take_over(self._snapshot / name, work / name)
    embeddings = np.load(work / "labels.npy", mmap_mode="r", allow_pickle=False)
    kind, scann = self.info["search"]["kind"], None
    if kind == "scann":
      scann = ScannIndex.load(self._snapshot / "scann")
      change(scann)
      if scann.needs_rebuild:
        _log.info("%s: over a tenth of the labels came or went since ScaNN was built; building it anew", self.folder)
        scann = ScannIndex(embeddings, rows=np.flatnonzero(~deleted))
      _save(scann, work / "scann")
    found = _search_info(kind, scann, embeddings, deleted, self._queries, self._mesh)
    return self.info | {"edits": self.info["edits"] + 1} | _counts(embeddings, deleted) | found


def _check_left(folder: Path, deleted: np.ndarray) -> None:
  if deleted.all():
    raise InputError(f"{folder}: no label would be left; an index needs one at least")


def _check_info(folder: Path, info: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
  if info.get("format") != FORMAT:
    raise InputError(
      f"{folder}: is an index of format {info.get('format')!r}, but this version reads format {FORMAT}; "
      f"{snapshots.remedy(folder)}"
    )
  if checkpoint is not None and info["checkpoint"] != checkpoint:
    described = ["step {step}, sha256 {sha256:.12}".format(**each) for each in (info["checkpoint"], checkpoint)]
    raise InputError(
      f"{folder}: was made from another checkpoint ({described[0]}) than the one in use "
      f"({described[1]}); {snapshots.remedy(folder)}"
    )


def _counts(embeddings: np.ndarray, deleted: np.ndarray) -> dict[str, Any]:
  return {"num_labels": len(embeddings), "dim": embeddings.shape[1], "num_deleted": int(deleted.sum())}


def _search_info(
  kind: str,
  scann: ScannIndex | None,
  embeddings: np.ndarray,
  deleted: np.ndarray,
  queries: np.ndarray | None,
  mesh: Mesh | None,
) -> dict[str, Any]:
  """What index.json says of the search: its parameters, and ScaNN's recall on a sample of queries."""
  if scann is None:
    return {"search": {"kind": kind}, "recall": None}
  live = np.flatnonzero(~deleted)
  pool, name = (embeddings[live], "labels") if queries is None else (queries, "training queries")
  sample = np.asarray(pool[np.linspace(0, len(pool) - 1, min(_RECALL_QUERIES, len(pool))).astype(int)], np.float32)
  mesh = Mesh(np.asarray(jax.local_devices()), ("data",)) if mesh is None else mesh
  k = min(max(RECALL_AT), len(live))
  _, wanted = ExactIndex(embeddings, mesh, rows=live).search(sample, k)
  _, found = scann.search(sample, k)
  recall = {f"recall@{at}": 100 * overlap(found[:, :at], wanted[:, :at]) for at in RECALL_AT}
  _log.info(
    "ScaNN finds %s of what exact search finds, for %s %s",
    " and ".join(f"{value:.2f} % ({name})" for name, value in recall.items()),
    f"{len(sample):,}",
    name,
  )
  parameters = dataclasses.asdict(scann.parameters)
  return {"search": {"kind": kind, "parameters": parameters}, "recall": recall | {"queries": len(sample), "of": name}}


def _save(scann: ScannIndex, folder: Path) -> None:
  folder.mkdir()
  scann.save(folder)


def _save_joined(path: Path, first: np.ndarray, second: np.ndarray) -> None:
  """One array file of the rows of both, without holding them in memory."""
  joined = np.lib.format.open_memmap(
    path, mode="w+", dtype=np.float32, shape=(len(first) + len(second), first.shape[1])
  )
  for start in range(0, len(first), _ROWS_AT_ONCE):
    part = first[start : start + _ROWS_AT_ONCE]
    joined[start : start + len(part)] = part
  joined[len(first) :] = second
  joined.flush()


def _numbered(rows: Sequence[Sequence[str]], names: Sequence[str]) -> Ragged:
  numbers = {name: number for number, name in enumerate(names)}
  return Ragged.from_rows([sorted({numbers[name] for name in row}) for row in rows])


def _renumbered(rows: Ragged, old: Sequence[str], new: Sequence[str]) -> Ragged:
  """Rows of numbers of the old names, as numbers of the new ones."""
  numbers = {name: number for number, name in enumerate(new)}
  return Ragged(np.asarray([numbers[name] for name in old], np.int32)[rows.values], rows.offsets)


def _shared_sets(keys: Sequence[Any], ids_of) -> IdSets | None:
  """One set for every distinct key that is not None."""
  distinct = {key: number for number, key in enumerate(dict.fromkeys(key for key in keys if key is not None))}
  if not distinct:
    return None
  return IdSets.of(
    Ragged.from_rows([ids_of(key) for key in distinct]), np.asarray([distinct.get(key, -1) for key in keys])
  )
