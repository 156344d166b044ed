"""Files of the label index: their format, writing a new index, and checking and memory-mapping an existing one.

A workdir's `index/` holds snapshots (see `snapshots`). Each is a folder of these files:

  index.json            format, checkpoint, search, counts, recall of ScaNN, settings of retrieval augmentation and of
                        the blend, names of the categories, and the sha256 of each file
  labels.npy            float32 [L, D], the vectors of labels; a label's row is its id, which is never reused
  deleted.npy           bool [L], whether each label was deleted
  texts, uids           ragged uint8, the UTF-8 of each label's text and uid
  label_clusters.npy    int32 [L], the free vector of each label
  clusters.npy          float32 [C, D], mean embedding of the labels of each free vector; zeros if it has no labels
  without_classifier.npy  float32 [D], what is added to the prototype of a label without a classifier; present where the
                        other vectors contain a share of classifiers
  categories            ragged int32, the categories of each label as positions in the list of index.json; optional
  queries.npy           float32 [N, D], embeddings of the training queries; optional
  query_labels          ragged int32, labels of each training query; present together with queries.npy
  query_texts           ragged uint8, the UTF-8 of each training query's text, cut to 200 characters; optional
  held_out.npy          float32 [S, D], queries that were not trained on, to measure the recall of ScaNN; optional
  blend_model.txt, ...  the trained blend, see `label_index_blend`; optional
  scann, scann_queries  ScaNN over the labels and over the training queries; only if the index was written for ScaNN

Ragged arrays are two files, NAME.values.npy and NAME.offsets.npy. Arrays are memory-mapped, so that opening an index of
a million labels creates no Python objects for them.
"""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import locked
from vixml_jax.ragged import Ragged
from vixml_jax.row_files import RowFiles, load_rows, save_rows
from vixml_jax.search import snapshots
from vixml_jax.search.index import KINDS
from vixml_jax.search.label_index_blend import StoredBlend
from vixml_jax.search.label_index_scann import build_scann, describe_search, save_scann
from vixml_jax.search.scann_recall import RecallGoal, recall_goal, recall_sample, sample_rows
from vixml_jax.search.text_table import TextTable

FORMAT = 1
WITHOUT_CLASSIFIER = "without_classifier.npy"
QUERY_TEXTS = "query_texts"
_QUERY_TEXT_FILES = (f"{QUERY_TEXTS}.values.npy", f"{QUERY_TEXTS}.offsets.npy")

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class IndexContents:
  """Contents of a label index.

  Attributes:
    embeddings: float32 [L, D], vectors of the labels; in memory or in files.
    texts: L texts to show to users.
    uids: L distinct names by which users refer to labels.
    label_clusters: int32 [L], the free vector of each label.
    cluster_means: float32 [C, D], mean embedding of the labels of each free vector; in memory or in files.
    deleted: bool [L], whether each label is deleted; None if no label is.
    queries: float32 [N, D], embeddings of the training queries, for retrieval and the blend; in memory or in files.
    query_labels: Labels of the training queries, N rows.
    query_texts: N texts of the training queries, which explanations show; None for an index without them.
    categories: Names of the categories of each label, L rows.
    held_out: float32 [H, D], queries that were not trained on; a sample of them is written to measure ScaNN's recall.
    blend: The trained blend of these labels and training queries; None for an index without one.
    without_classifier: float32 [D], what is added to the prototype of a label without a classifier; None where vectors
      are prototypes.
  """

  embeddings: np.ndarray | RowFiles
  texts: Sequence[str] | TextTable
  uids: Sequence[str] | TextTable
  label_clusters: np.ndarray
  cluster_means: np.ndarray | RowFiles
  deleted: np.ndarray | None = None
  queries: np.ndarray | RowFiles | None = None
  query_labels: Ragged | None = None
  query_texts: Sequence[str] | TextTable | None = None
  categories: Sequence[Sequence[str]] | None = None
  held_out: np.ndarray | RowFiles | None = None
  blend: StoredBlend | None = None
  without_classifier: np.ndarray | None = None

  def __post_init__(self) -> None:
    counts = {
      name: len(value)
      for name in ("embeddings", "texts", "uids", "label_clusters", "deleted", "categories")
      if (value := getattr(self, name)) is not None
    }
    if len(set(counts.values())) > 1:
      raise ValueError(f"different numbers of labels: {counts}")
    numbers = [-1 if part is None else len(part) for part in (self.queries, self.query_labels)]
    if numbers[0] != numbers[1]:
      raise ValueError("training queries and their labels must be given together, in equal numbers")
    if self.query_texts is not None and len(self.query_texts) != numbers[0]:
      raise ValueError(f"{len(self.query_texts)} texts of training queries: there must be {max(numbers[0], 0)}")
    if self.blend is not None:
      words = tuple(part.shape[0] for part in self.blend.words)
      if words != (len(self.embeddings), numbers[0]):
        raise ValueError(
          f"words of {words} labels and training queries: there must be {len(self.embeddings), numbers[0]}"
        )
      if self.blend.classifiers is not None and len(self.blend.classifiers) != len(self.embeddings):
        raise ValueError(f"classifiers of {len(self.blend.classifiers)} labels: there must be {len(self.embeddings)}")


@dataclasses.dataclass(frozen=True)
class IndexFiles:
  """Memory-mapped files of one snapshot.

  Attributes:
    folder: Folder of the index, `index/` of a workdir.
    snapshot: Path, index.json and pointer of the snapshot.
    embeddings: float32 [L, D], vectors of all labels, deleted ones included.
    deleted: bool [L], whether each label is deleted; in memory.
    label_clusters: int32 [L], the free vector of each label.
    cluster_means: float32 [C, D], mean embedding of the labels of each free vector.
    texts: Texts of the labels.
    uids: Uids of the labels.
    categories: Categories of each label, as positions in `category_names`; None if no label has any.
    queries: float32 [N, D], embeddings of the training queries; None if the index has none.
    query_labels: Labels of the training queries, deleted ones included, N rows; None if the index has none.
    query_texts: Texts of the training queries; None if the index has none.
    held_out: float32 [S, D], sample of queries that were not trained on; None if the index has none.
    blend: The trained blend; None if the index has none.
    without_classifier: float32 [D], as in `IndexContents`; None where vectors are prototypes.
  """

  folder: Path
  snapshot: snapshots.Snapshot
  embeddings: np.ndarray
  deleted: np.ndarray
  label_clusters: np.ndarray
  cluster_means: np.ndarray
  texts: TextTable
  uids: TextTable
  categories: Ragged | None
  queries: np.ndarray | None
  query_labels: Ragged | None
  query_texts: TextTable | None
  held_out: np.ndarray | None
  blend: StoredBlend | None
  without_classifier: np.ndarray | None

  @property
  def info(self) -> dict[str, Any]:
    """Content of index.json."""
    return self.snapshot.info

  @property
  def num_labels(self) -> int:
    """Number of labels L, deleted ones included."""
    return len(self.embeddings)

  @property
  def category_names(self) -> list[str]:
    """Names of all categories, sorted."""
    return self.info["categories"] or []

  @property
  def has_scann(self) -> bool:
    """Whether ScaNN is stored in the snapshot."""
    return bool(self.info["search"]["kind"] == "scann")

  @property
  def scann_recall(self) -> float:
    """Share of the 100 best labels that ScaNN must find; 0 takes its settings of search by rules of thumb."""
    return float(self.info["search"].get("scann_recall", 0.0))  # Older files lack it.

  @property
  def recall_goal(self) -> RecallGoal | None:
    """Recall that ScaNN must reach; None if nothing was asked for."""
    return recall_goal(self.scann_recall, recall_sample(self.embeddings, self.deleted, self.queries, self.held_out))


def write_index(
  folder: str | Path,
  contents: IndexContents,
  *,
  checkpoint: dict[str, Any],
  search: str,
  scann_recall: float = 0.0,
  retrieval: dict[str, Any] | None = None,
  mesh: Mesh | None = None,
) -> None:
  """Writes an index, which replaces any index in the folder in one step.

  With search="scann", ScaNN is built over the labels and over the training queries. Its recall against exact search is
  measured, logged and stored. It is measured on held-out queries, or else on training queries, or else on labels.

  Args:
    folder: `index/` of a workdir. Only one process may write it at a time.
    contents: Contents of the index.
    checkpoint: Step and sha256 of the model that computed the embeddings.
    search: "exact" or "scann".
    scann_recall: Share of the 100 best labels that ScaNN must find, also if it is built later; 0 takes its settings of
      search by rules of thumb.
    retrieval: Lambda, temperature and hits of retrieval-augmented inference; None if the index is not meant for it.
    mesh: Devices of the exact search that recall is measured with; None uses all devices of this process.

  Raises:
    InputError: Two labels have the same uid, ScaNN cannot run here, or the folder cannot be written to.
  """
  if search not in KINDS:
    raise InputError(f"search={search!r} is not known: use one of {', '.join(KINDS)}")
  folder = Path(folder)
  uids = as_table(contents.uids)
  if (duplicate := uids.first_duplicate()) is not None:
    raise InputError(f"label uid {duplicate!r} is used by two labels; every label needs its own")
  deleted = np.zeros(len(uids), bool) if contents.deleted is None else np.asarray(contents.deleted, bool)
  names = sorted({name for row in contents.categories or () for name in row})

  def fill(work: Path) -> dict[str, Any]:
    save_rows(work / "labels.npy", contents.embeddings)
    np.save(work / "deleted.npy", deleted)
    np.save(work / "label_clusters.npy", np.asarray(contents.label_clusters, np.int32))
    save_rows(work / "clusters.npy", contents.cluster_means)
    as_table(contents.texts).rows.save(work / "texts")
    uids.rows.save(work / "uids")
    if contents.categories is not None:
      category_rows(contents.categories, names).save(work / "categories")
    if contents.queries is not None and contents.query_labels is not None:
      save_rows(work / "queries.npy", contents.queries)
      contents.query_labels.save(work / "query_labels")
    if contents.query_texts is not None:
      as_table(contents.query_texts).rows.save(work / QUERY_TEXTS)
    held_out = None if contents.held_out is None else load_rows(contents.held_out)
    if held_out is not None:
      held_out = held_out[sample_rows(len(held_out))]
      np.save(work / "held_out.npy", held_out)
    if contents.blend is not None:
      contents.blend.save(work)
    if contents.without_classifier is not None:
      np.save(work / WITHOUT_CLASSIFIER, np.asarray(contents.without_classifier, np.float32))
    scann, embeddings, queries, sample = None, contents.embeddings, contents.queries, None
    if search == "scann":  # It needs all vectors in memory.
      embeddings, queries = load_rows(embeddings), None if queries is None else load_rows(queries)
      sample = recall_sample(embeddings, deleted, queries, held_out)
      goal = recall_goal(scann_recall, sample)
      scann = build_scann(embeddings, np.flatnonzero(~deleted), goal, mesh)
      save_scann(scann, work / "scann")
      if queries is not None:
        save_scann(build_scann(queries, None, goal, mesh), work / "scann_queries")
    return {
      "format": FORMAT,
      "checkpoint": checkpoint,
      "edits": 0,
      "retrieval": retrieval,
      "blend": None if contents.blend is None else contents.blend.settings,
      "categories": None if contents.categories is None else names,
      **describe_search(embeddings, deleted, scann, scann_recall, sample, mesh),
    }

  with locked(folder / snapshots.LOCK):
    snapshots.write_snapshot(folder, fill)


def is_edited(folder: str | Path, checkpoint: dict[str, Any]) -> bool:
  """Returns whether the folder holds an index of this checkpoint that was edited after it was written.

  Raises:
    InputError: There is an index, but it is damaged.
  """
  if not (Path(folder) / snapshots.CURRENT).exists():
    return False
  info = snapshots.read_current(Path(folder)).info
  return bool(info.get("format") == FORMAT and info["checkpoint"] == checkpoint and info["edits"] > 0)


def open_current(
  folder: Path, construct: Callable[[IndexFiles], _T], *, checkpoint: dict[str, Any] | None, verify: bool
) -> _T:
  """Checks and maps the current snapshot and returns `construct` of its files.

  If another process replaces and removes the snapshot meanwhile, the next one is opened.

  Args:
    folder: `index/` of a workdir.
    construct: Function of the files, which may read further files of the snapshot.
    checkpoint: Step and sha256 of the model that the index must belong to; None accepts any model.
    verify: Whether to compare the sha256 of every file; otherwise only sizes are compared.

  Raises:
    InputError: There is no index, a file is missing or damaged, or the index has another format or checkpoint.
  """
  while True:
    snapshot = snapshots.read_current(folder)
    try:
      _check_info(folder, snapshot.info, checkpoint)
      snapshots.check_files(snapshot.path, snapshot.info["files"], contents=verify)
      return construct(_map_files(folder, snapshot))
    except (OSError, ValueError) as error:  # InputError is a ValueError.
      if snapshots.read_current(folder).path == snapshot.path:
        if isinstance(error, InputError):
          raise
        raise InputError(f"{snapshot.path}: cannot be read ({error}); {snapshots.remedy(folder)}") from error


def category_rows(rows: Sequence[Sequence[str]], names: Sequence[str]) -> Ragged:
  """Returns, for each row of category names, their positions in `names`, ascending and distinct."""
  positions = {name: position for position, name in enumerate(names)}
  return Ragged.from_rows([sorted({positions[name] for name in row}) for row in rows])


def as_table(texts: Sequence[str] | TextTable) -> TextTable:
  """Returns texts as a table."""
  return texts if isinstance(texts, TextTable) else TextTable.from_texts(texts)


def _map_files(folder: Path, snapshot: snapshots.Snapshot) -> IndexFiles:
  path, info = snapshot.path, snapshot.info
  mapped = lambda name: np.load(path / name, mmap_mode="r", allow_pickle=False)
  has_queries = "queries.npy" in info["files"]
  return IndexFiles(
    folder=folder,
    snapshot=snapshot,
    embeddings=mapped("labels.npy"),
    deleted=np.asarray(mapped("deleted.npy")),
    label_clusters=mapped("label_clusters.npy"),
    cluster_means=mapped("clusters.npy"),
    texts=TextTable(Ragged.load(path / "texts")),
    uids=TextTable(Ragged.load(path / "uids")),
    categories=None if info["categories"] is None else Ragged.load(path / "categories"),
    queries=mapped("queries.npy") if has_queries else None,
    query_labels=Ragged.load(path / "query_labels") if has_queries else None,
    query_texts=TextTable(Ragged(*(mapped(name) for name in _QUERY_TEXT_FILES)))
    if _QUERY_TEXT_FILES[0] in info["files"]  # Older indexes lack them.
    else None,
    held_out=mapped("held_out.npy") if "held_out.npy" in info["files"] else None,
    blend=StoredBlend.open(path, settings) if (settings := info.get("blend")) else None,  # Older files lack the key.
    without_classifier=np.asarray(mapped(WITHOUT_CLASSIFIER)) if WITHOUT_CLASSIFIER in info["files"] else None,
  )


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
