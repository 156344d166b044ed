"""The label index: searches the labels of a trained model, on disk, and finds them by uid and by category.

The module is long because everything that reads or edits an index goes through its one class; the work is done in the
modules beside it.
"""

from collections.abc import Sequence
import functools
from pathlib import Path
from typing import Any, Self

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.search import label_index_editing, snapshots
from vixml_jax.search.filters import Filters, search_filtered, shared_sets
from vixml_jax.search.index import Index, make_index
from vixml_jax.search.label_index_blend import StoredBlend, WordVectors
from vixml_jax.search.label_index_files import IndexContents, IndexFiles, open_current
from vixml_jax.search.scann_index import ScannIndex
from vixml_jax.search.text_table import TextTable
from vixml_jax.search.vector_form import WHOLE, VectorForm

_MAX_NAMES_SHOWN = 10


class LabelIndex:
  """One snapshot of an index on disk, opened; it never changes.

  `add`, `delete` and `categorize` write the next snapshot and return it, opened. `label_index_files` describes the
  files.

  Attributes:
    folder: `index/` of a workdir.
    current: Content of the file CURRENT when the index was opened. If `snapshots.read_pointer(folder)` returns
      something else, a newer snapshot was written.
    info: Content of index.json.
    embeddings: float32 [L, D], vectors of all labels, deleted ones included; memory-mapped.
    deleted: bool [L], whether each label is deleted.
    label_clusters: int32 [L], the free vector of each label.
    cluster_means: float32 [C, D], mean embedding of the labels of each free vector.
    search_kind: How the index is searched, "exact" or "scann".
    form: How vectors are held for search.
  """

  def __init__(self, files: IndexFiles, search: str, mesh: Mesh | None, form: VectorForm = WHOLE):
    """Wraps the files of a snapshot; use `open`."""
    self.folder = files.folder
    self.current, self.info = files.snapshot.pointer, files.info
    self.embeddings, self.deleted = files.embeddings, files.deleted
    self.label_clusters, self.cluster_means = files.label_clusters, files.cluster_means
    form.check(self.dim, search)
    self.search_kind, self.form = search, form
    self._files, self._mesh = files, mesh
    if search == "scann":
      _ = self.label_index  # Loaded now, because the next snapshot removes its files.

  @classmethod
  def open(
    cls,
    folder: str | Path,
    *,
    checkpoint: dict[str, Any] | None,
    search: str | None = None,
    mesh: Mesh | None = None,
    form: VectorForm = WHOLE,
    verify: bool = True,
  ) -> Self:
    """Opens the current snapshot.

    Args:
      folder: `index/` of a workdir.
      checkpoint: Step and sha256 of the model that will encode queries; None accepts an index of any model.
      search: "exact" or "scann"; None searches as the index was written for. ScaNN that is not stored is built in
        memory.
      mesh: Devices of the exact search; None uses all devices.
      form: How vectors are held for search. Codes are made from the float32 vectors when a search first needs them.
      verify: Whether to compare the sha256 of every file, which reads all of them; otherwise only sizes are compared.

    Raises:
      InputError: There is no index, a file is missing or damaged, the index has another format or checkpoint, ScaNN was
        asked for and cannot run here, or the index cannot have the form.
    """
    return open_current(
      Path(folder),
      lambda files: cls(files, search or files.info["search"]["kind"], mesh, form),
      checkpoint=checkpoint,
      verify=verify,
    )

  def __repr__(self) -> str:
    return (
      f"LabelIndex(folder={str(self.folder)!r}, labels={self.num_live}, dim={self.dim}, search={self.search_kind!r})"
    )

  @property
  def num_labels(self) -> int:
    """Number of labels L, deleted ones included; ids are below it."""
    return self._files.num_labels

  @property
  def num_live(self) -> int:
    """Number of labels that are not deleted."""
    return int(np.sum(~self.deleted))

  @property
  def dim(self) -> int:
    """Dimension D of the embeddings."""
    return self.embeddings.shape[1]

  @property
  def retrieval(self) -> dict[str, Any] | None:
    """`lambda`, `temperature` and `hits` of retrieval-augmented inference; None if the index is not meant for it."""
    return self.info["retrieval"]

  @property
  def categories(self) -> list[str]:
    """Names of all categories, sorted."""
    return self._files.category_names

  @property
  def blend(self) -> StoredBlend | None:
    """The trained blend, with the words of deleted labels included; None if the index has none."""
    return self._files.blend

  @functools.cached_property
  def label_index(self) -> Index:
    """Index of the labels that are not deleted; its results are label ids."""
    if self.search_kind == "scann" and self._files.has_scann:
      return ScannIndex.load(self._files.snapshot.path / "scann")
    live = np.flatnonzero(~self.deleted) if self.deleted.any() else None
    return self._make_index(self.embeddings, live)

  @functools.cached_property
  def query_index(self) -> Index:
    """Index of the training queries. With ScaNN, access it before the next snapshot removes its files.

    Raises:
      InputError: The index was written without training queries.
    """
    queries, _ = self._training_queries()
    if self.search_kind == "scann" and self._files.has_scann:
      return ScannIndex.load(self._files.snapshot.path / "scann_queries")
    return self._make_index(queries)

  @functools.cached_property
  def query_labels(self) -> Ragged:
    """Labels of the training queries, without deleted ones, N rows.

    Raises:
      InputError: The index was written without training queries.
    """
    _, rows = self._training_queries()
    kept = ~self.deleted[rows.values]
    if kept.all():
      return rows
    return Ragged.of_lengths(rows.values[kept], np.bincount(rows.row_ids()[kept], minlength=len(rows)))

  @property
  def query_texts(self) -> TextTable | None:
    """Texts of the training queries, N rows; None if the index has none."""
    return self._files.query_texts

  def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the texts of labels, deleted or not."""
    return self._files.texts.take(ids)

  def uids(self, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the uids of labels, deleted or not."""
    return self._files.uids.take(ids)

  def ids_of(self, uids: Sequence[str]) -> np.ndarray:
    """Returns the ids of labels, int32.

    Raises:
      InputError: A uid is unknown, or its label was deleted; the message names it.
    """
    ids = self._find(uids)
    for uid, deleted in zip(uids, self.deleted[ids], strict=True):
      if deleted:
        raise InputError(f"label {uid!r} was deleted from {self.folder}; use the uid of another label")
    return ids

  def has(self, uids: Sequence[str]) -> np.ndarray:
    """Returns bool, whether each uid belongs to a label that is not deleted."""
    ids = self._files.uids.find(uids)
    return (ids >= 0) & ~self.deleted[ids]

  def filters(
    self,
    allow: Sequence[Sequence[str] | None] | None = None,
    deny: Sequence[Sequence[str] | None] | None = None,
    categories: Sequence[Sequence[str] | None] | None = None,
  ) -> Filters:
    """Returns filters for `search` from uids and names of categories.

    A query with both allowed labels and categories may have the allowed labels that are in at least one of the
    categories. Uids of deleted labels are accepted and match nothing.

    Args:
      allow: Uids that each query may have, or None for all; an empty list allows none.
      deny: Uids that each query may not have.
      categories: Categories whose labels each query may have, or None for all.

    Raises:
      InputError: A uid or category is unknown; the message names it.
    """
    num_queries = next((len(part) for part in (allow, categories) if part is not None), 0)
    nothing = [None] * num_queries
    allowed_by = [
      None
      if uids is None and names is None
      else (None if uids is None else tuple(uids), None if names is None else tuple(names))
      for uids, names in zip(allow or nothing, categories or nothing, strict=True)
    ]
    return Filters(
      shared_sets(allowed_by, lambda key: self._allowed_ids(*key)),
      shared_sets([tuple(uids) if uids else None for uids in deny or ()], self._find),
    )

  def search(
    self, queries: np.ndarray | jax.Array, k: int, filters: Filters | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k best labels of each query among those that are not deleted and that its filter allows.

    Args:
      queries: Queries float32 [Q, D].
      k: Number of labels to return for each query, at least 1.
      filters: Labels that each query may have, from `filters`; `search_filtered` explains how they are applied.

    Returns:
      Scores float32 [Q, K] in descending order and ids int32 [Q, K]. Score -inf and id -1 fill the places of a query
      that may have fewer labels.
    """
    if filters is None or (filters.allow is None and filters.deny is None):
      return self.label_index.search(queries, k)
    queries = np.asarray(self.form.queries(queries), np.float32)
    return search_filtered(self.label_index, self.form.vectors(self.embeddings), ~self.deleted, queries, k, filters)

  def vectors_of(self, prototypes: np.ndarray) -> np.ndarray:
    """Returns the vectors that labels without a classifier have in this index, float32 [n, D].

    Args:
      prototypes: float32 [n, D] at unit norm.
    """
    added = self._files.without_classifier
    return prototypes if added is None else prototypes + added

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
    query_texts: Sequence[str] | None = None,
    words: WordVectors | None = None,
    delete: Sequence[int] | np.ndarray = (),
  ) -> "LabelIndex":
    """Adds labels and returns the next snapshot, in which their ids are the last ones.

    ScaNN, if it is stored, is updated and its recall is measured again.

    Args:
      embeddings: float32 [n, D], vectors of the new labels; see `vectors_of`.
      texts: n texts.
      uids: n names.
      label_clusters: int32 [n], the free vector of each new label.
      categories: Names of the categories of each new label; None for no categories.
      queries: float32 [m, D], embeddings of training queries that have the new labels. An index without training
        queries ignores them.
      query_labels: New labels of each of these queries, 0 to n - 1, m rows.
      query_texts: Texts of these queries. An index with texts of training queries needs them; others ignore them.
      words: TF-IDF vectors of the new labels [n, F] and of these queries [m, F]. An index with a blend needs them;
        others ignore them.
      delete: Ids of labels to delete in the same step, such as labels that are replaced.

    Raises:
      InputError: A uid belongs to another label, an id to delete does not exist, or no label would remain.
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
      query_texts=query_texts,
    )
    label_index_editing.add_labels(self._files, new, words, np.asarray(delete, np.int64), self._mesh)
    return self._reopened()

  def delete(self, ids: Sequence[int] | np.ndarray) -> "LabelIndex":
    """Deletes labels permanently and returns the next snapshot. Their ids are not reused; their uids may be.

    Args:
      ids: Ids of labels.

    Raises:
      InputError: An id does not exist, or no label would remain.
    """
    label_index_editing.delete_labels(self._files, np.asarray(ids, np.int64), self._mesh)
    return self._reopened()

  def categorize(self, ids: Sequence[int] | np.ndarray, categories: Sequence[Sequence[str]]) -> "LabelIndex":
    """Replaces the categories of labels and returns the next snapshot.

    Args:
      ids: Ids of labels, each once.
      categories: Names of the categories of each label; an empty list removes it from all categories.

    Raises:
      InputError: An id does not exist.
    """
    label_index_editing.set_categories(self._files, np.asarray(ids, np.int64), categories)
    return self._reopened()

  def _make_index(self, vectors: np.ndarray, rows: np.ndarray | None = None) -> Index:
    if self.search_kind == "exact":
      return self.form.make_index(vectors, self._mesh, rows)
    return make_index(self.search_kind, vectors, self._mesh, rows, goal=self._files.recall_goal)

  def in_folder(self, folder: Path) -> "LabelIndex":
    """Returns the index of another folder, of the same checkpoint and opened in the same way.

    Raises:
      InputError: It is of another checkpoint, or damaged.
    """
    return LabelIndex.open(
      folder, checkpoint=self.info["checkpoint"], search=self.search_kind, mesh=self._mesh, form=self.form
    )

  def _reopened(self) -> "LabelIndex":
    checkpoint = self.info["checkpoint"]
    return LabelIndex.open(
      self.folder, checkpoint=checkpoint, search=self.search_kind, mesh=self._mesh, form=self.form, verify=False
    )

  def _training_queries(self) -> tuple[np.ndarray, Ragged]:
    """Returns the embeddings of the training queries and their labels, deleted ones included."""
    queries, labels = self._files.queries, self._files.query_labels
    if queries is None or labels is None:
      raise InputError(
        f"{self.folder}: was written without the training queries, which retrieval-augmented inference "
        f"needs; {snapshots.remedy(self.folder)} with --retrieval_augmented"
      )
    return queries, labels

  def _find(self, uids: Sequence[str]) -> np.ndarray:
    """Returns the ids of labels, deleted or not."""
    ids = self._files.uids.find(uids)
    for uid, label in zip(uids, ids, strict=True):
      if label < 0:
        raise InputError(
          f"label {uid!r} is not in {self.folder}; use the uid of a label of the data set or of one that was added"
        )
    return ids

  @functools.cached_property
  def _labels_of_categories(self) -> dict[str, np.ndarray]:
    rows = self._files.categories
    if rows is None:
      return {}
    members = rows.transpose(len(self.categories))
    return {name: members[position] for position, name in enumerate(self.categories)}

  def _allowed_ids(self, uids: tuple[str, ...] | None, names: tuple[str, ...] | None) -> np.ndarray:
    """Returns the ids of labels with one of the uids and one of the categories; one of the two may be None for all."""
    if names is None:
      return self._find(uids or ())
    for name in names:
      if name not in self._labels_of_categories:
        known = ", ".join(self.categories[:_MAX_NAMES_SHOWN]) or "none"
        raise InputError(
          f"category {name!r} is not in {self.folder}, which has {len(self.categories)}: {known}"
          f"{', ...' if len(self.categories) > _MAX_NAMES_SHOWN else ''}"
        )
    members = functools.reduce(np.union1d, (self._labels_of_categories[name] for name in names), np.zeros(0, np.int32))
    return members if uids is None else np.intersect1d(members, self._find(uids))
