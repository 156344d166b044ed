"""New labels without training: a file of them, their free vectors, centroids and prototypes, and the next index."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, cast

from jax.sharding import Mesh
import numpy as np

from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import normalize
from vixml_jax.errors import InputError
from vixml_jax.inference.predictor import Predictor
from vixml_jax.inference.queries import Query, QueryFormat
from vixml_jax.inference.query_files import open_queries
from vixml_jax.mining.centroids import mean_of_rows
from vixml_jax.ragged import Ragged
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.label_index import LabelIndex

KEYS = ("uid", "title", "content", "images", "categories", "positives")
"""Keys of a new label."""
POSITIVE_KEYS = ("uid", "title", "content", "images")
"""Keys of a query that is given as a positive of a new label."""

_LINES_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class NewLabel(Query):
  """A label whose values have been checked: text and images as of a query, and the categories that it is in.

  Attributes:
    uid: what users call it.
    positives: queries that have it.
  """

  uid: str = ""
  positives: tuple[Query, ...] = ()


class LabelFormat(QueryFormat):
  """What a model makes of a label; its values are those of `QueryFormat`."""

  def parse(self, given: str | Mapping[str, Any], where: str, root: Path | None = None) -> NewLabel:
    """Checks a label.

    Args:
      given: a dict of `KEYS`; None stands for a key that is not there. Each positive is a text, or a dict of
        `POSITIVE_KEYS`.
      where: what errors call it.
      root: the folder that relative paths of images start from; None for the current one.

    Raises:
      InputError: naming `where`, the key and what it must be.
    """
    if not isinstance(given, Mapping):
      raise InputError(f"{where}: must be an object with 'uid' and {self.required!r}, not {type(given).__name__}")
    _check_known(given, KEYS, where)
    for key in ("uid", self.required):
      if given.get(key) is None:
        raise InputError(f"{where}: has no {key!r}; every label needs one")
    item = QueryFormat.parse(self, {key: given[key] for key in given if key != "positives"}, where, root)
    if not given[self.required].strip():
      raise InputError(f"{where}: {self.required!r} is empty; a label is found by its text")
    return NewLabel(
      **vars(item) | {"uid": _checked_uid(str(item.uid), where)},
      positives=self._positives(given.get("positives"), where, root),
    )

  def _positives(self, given: Any, where: str, root: Path | None) -> tuple[Query, ...]:
    if given is None:
      return ()
    if not isinstance(given, list | tuple):
      raise InputError(f"{where}: 'positives' must be a list of queries, not {type(given).__name__}")
    queries = []
    for number, positive in enumerate(given):
      place = f"{where}: positive {number}"
      if isinstance(positive, Mapping):
        _check_known(positive, POSITIVE_KEYS, place)
      queries.append(QueryFormat.parse(self, positive, place, root))
      if not queries[-1].text.strip():
        raise InputError(f"{place}: has no text; leave it out")
    return tuple(queries)


def read_labels(path: Path, wanted: LabelFormat) -> list[NewLabel]:
  """New labels from a file with an object a line; blank lines are passed over.

  Args:
    path: `.jsonl`; paths of images start from its folder.
    wanted: what the model takes.

  Raises:
    InputError: naming file and line.
  """
  if path.suffix != ".jsonl":
    raise InputError(f"{path}: files of labels end in .jsonl and hold an object a line; convert or rename it")
  if not path.is_file():
    raise InputError(f"{path}: no such file; --labels must name one")
  labels = list(itertools.chain.from_iterable(open_queries(path, wanted).blocks(_LINES_AT_ONCE)))
  if not labels:
    raise InputError(f"{path}: holds no label")
  return cast(list[NewLabel], labels)  # What `LabelFormat` parses.


def read_uids(path: Path) -> dict[str, str]:
  """Uids from a file with one a line, each with the line that it stands in last; blank lines are passed over.

  Raises:
    InputError: it cannot be read, or holds none.
  """
  try:
    lines = [line.removesuffix("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: cannot be read ({error}); --delete must name a text file with a uid a line") from error
  uids = {line: f"{path}:{number}" for number, line in enumerate(lines, 1) if line.strip()}
  if not uids:
    raise InputError(f"{path}: holds no uid")
  return uids


def ids_of_uids(index: LabelIndex, uids: Mapping[str, str]) -> np.ndarray:
  """int32 ids of labels, by uids from `read_uids`.

  Raises:
    InputError: naming the line of a uid that is unknown or whose label was deleted.
  """
  ids = [_found(index, uid, where) for uid, where in uids.items()]
  return np.concatenate(ids) if ids else np.zeros(0, np.int32)


def check_new(index: LabelIndex, labels: Sequence[NewLabel], free: Mapping[str, str]) -> None:
  """Refuses uids that stand for another label.

  Args:
    index: where the labels will go.
    labels: to be added.
    free: uids of labels that will have been deleted.

  Raises:
    InputError: naming the line.
  """
  seen: dict[str, str] = {}
  for label in labels:
    if label.uid in seen:
      raise InputError(
        f"{label.where}: uid {label.uid!r} stands for the label of {seen[label.uid]}, too; every label needs its own"
      )
    seen[label.uid] = label.where
    if label.uid not in free and _is_taken(index, label.uid):
      raise InputError(
        f"{label.where}: uid {label.uid!r} stands for a label of {index.folder} already; give it "
        "another, or name this one in --delete as well, to replace that label"
      )


@dataclasses.dataclass(frozen=True)
class EmbeddedLabels:
  """What n new labels with m positives come to.

  Attributes:
    prototypes: float32 [n, D], unit norm.
    clusters: int32 [n], the free vector of each.
    queries: float32 [m, D], embeddings of the positives.
    query_labels: the place of the label that each positive has, m rows.
  """

  prototypes: np.ndarray
  clusters: np.ndarray
  queries: np.ndarray
  query_labels: Ragged


def embed_labels(predictor: Predictor, labels: Sequence[NewLabel]) -> EmbeddedLabels:
  """Prototypes of new labels by the trained prototype network, which takes three vectors of each (METHOD, prototypes).

  Its text and images, encoded. The free vector of the cluster whose mean embedding is nearest by cosine: clusters are
  as training left them, so it does not matter which labels are added first. And for a centroid the mean embedding of
  its positives, or its own embedding where it has none.

  Args:
    predictor: the trained encoder, and the index with the clusters.
    labels: what to embed.

  Raises:
    InputError: naming the line of a picture that cannot be read.
  """
  vectors = predictor.image_vectors(labels, None) if predictor.encoder.images else None
  pooled = predictor.encoder.pooled([label.text for label in labels], vectors)
  own = normalize(pooled.copy())
  clusters = nearest_clusters(own, predictor.index.cluster_means, predictor.mesh)
  counts = np.asarray([len(label.positives) for label in labels])
  positives = [query for label in labels for query in label.positives]
  queries = predictor.encode(positives) if positives else own[:0]
  centroids = _centroids(own, queries, counts, predictor.mesh)
  return EmbeddedLabels(
    predictor.encoder.prototypes(pooled, clusters, centroids),
    clusters,
    queries,
    Ragged.of_lengths(np.repeat(np.arange(len(labels), dtype=np.int32), counts), np.ones(len(queries), np.int64)),
  )


def nearest_clusters(embeddings: np.ndarray, clusters: np.ndarray, mesh: Mesh) -> np.ndarray:
  """int32 [n], the cluster of highest cosine; of equals the first.

  Args:
    embeddings: float32 [n, D].
    clusters: float32 [C, D], means of the labels' embeddings; a cluster without labels is zero, and no one's nearest.
    mesh: devices to search on.
  """
  inhabited = np.flatnonzero(np.any(clusters, axis=1))
  _, ids = ExactIndex(normalize(np.array(clusters)), mesh, rows=inhabited).search(embeddings, 1)
  return ids[:, 0]


def add_labels(
  index: LabelIndex, labels: Sequence[NewLabel], embedded: EmbeddedLabels, delete: np.ndarray
) -> LabelIndex:
  """Writes the next snapshot of an index; see `LabelIndex.add`.

  Args:
    index: where the labels go.
    labels: what to add; their positives join the training queries, so that they have a say with retrieval augmentation.
    embedded: the same labels.
    delete: ids of labels that go in the same step.

  Raises:
    InputError: another process has added a label of the same uid in the meantime.
  """
  categories = [label.categories or () for label in labels]
  return index.add(
    embedded.prototypes,
    [label.text for label in labels],
    [label.uid for label in labels],
    embedded.clusters,
    categories if any(categories) else None,
    queries=embedded.queries if len(embedded.queries) else None,
    query_labels=embedded.query_labels if len(embedded.queries) else None,
    delete=delete,
  )


def read_categories(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
  """Where each uid of a file stands, and the categories of its label; blank lines are passed over.

  Args:
    path: `.jsonl`, each line with `uid` and `categories`, a list of names.

  Raises:
    InputError: naming file and line.
  """
  try:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: cannot be read ({error}); --categories must name a file of JSON lines") from error
  found: dict[str, tuple[str, tuple[str, ...]]] = {}
  for where, line in ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()):
    uid, names = _uid_and_categories(line, where)
    if uid in found:
      raise InputError(f"{where}: uid {uid!r} stands in {found[uid][0]}, too; give all its categories in one line")
    found[uid] = where, names
  if not found:
    raise InputError(f"{path}: holds no uid")
  return found


def check_categories(
  index: LabelIndex,
  categories: Mapping[str, tuple[str, tuple[str, ...]]],
  labels: Sequence[NewLabel],
  doomed: Mapping[str, str],
) -> None:
  """Refuses categories of labels that there will not be.

  Args:
    index: where labels are.
    categories: from `read_categories`.
    labels: to be added.
    doomed: uids of labels that will be deleted.

  Raises:
    InputError: naming the line.
  """
  new = {label.uid for label in labels}
  there = {uid: where for uid, (where, _) in categories.items() if uid not in new}
  ids_of_uids(index, there)
  for uid in there.keys() & doomed.keys():
    raise InputError(f"{there[uid]}: label {uid!r} is to be deleted by {doomed[uid]}; take one of the lines out")


def set_categories(index: LabelIndex, categories: Mapping[str, tuple[str, tuple[str, ...]]]) -> LabelIndex:
  """Writes the next snapshot of an index, whose labels are in these categories; see `read_categories`.

  Raises:
    InputError: naming the line of a uid that is unknown or whose label was deleted.
  """
  ids = ids_of_uids(index, {uid: where for uid, (where, _) in categories.items()})
  return index.categorize(ids, [names for _, names in categories.values()])


def _uid_and_categories(line: str, where: str) -> tuple[str, tuple[str, ...]]:
  try:
    given = json.loads(line)
  except ValueError as error:
    raise InputError(f"{where}: is not JSON ({error})") from error
  if not isinstance(given, dict) or set(given) != {"uid", "categories"} or not isinstance(given["uid"], str):
    raise InputError(f"{where}: must be an object with 'uid', a text, and 'categories', a list of names")
  names = given["categories"]
  if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
    raise InputError(f"{where}: 'categories' must be a list of names")
  return _checked_uid(given["uid"], where), tuple(dict.fromkeys(names))


def _centroids(own: np.ndarray, queries: np.ndarray, counts: np.ndarray, mesh: Mesh) -> np.ndarray:
  """float32 [n, D]: means of the labels' positives, `counts` of each, as for training; else their own embeddings."""
  if not len(queries):
    return own
  members = Ragged.of_lengths(np.arange(len(queries), dtype=np.int32), counts)
  return np.where(counts[:, None] > 0, sharding.to_host(mean_of_rows(queries, members, mesh=mesh)), own)


def _check_known(given: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
  unknown = [key for key in given if key not in keys]
  if unknown:
    raise InputError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(keys)}")


def _checked_uid(uid: str, where: str) -> str:
  try:
    uid.encode()
  except UnicodeEncodeError as error:
    raise InputError(f"{where}: 'uid' holds half a surrogate pair, which no file can store") from error
  if not uid.strip():
    raise InputError(f"{where}: 'uid' is empty; every label needs one")
  return uid


def _found(index: LabelIndex, uid: str, where: str) -> np.ndarray:
  try:
    return index.ids_of([uid])
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def _is_taken(index: LabelIndex, uid: str) -> bool:
  try:
    index.ids_of([uid])
  except InputError:  # Unknown, or of a deleted label.
    return False
  return True
