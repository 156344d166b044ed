"""Adds labels without training: computes their prototypes and writes the next snapshot of the index."""

from collections.abc import Mapping, Sequence
import dataclasses

from jax.sharding import Mesh
import numpy as np

from vixml_jax import sharding
from vixml_jax.blend.lexical import TfIdf, count_ngrams
from vixml_jax.encoding.item_encoder import normalize
from vixml_jax.errors import InputError
from vixml_jax.inference.label_files import LabelCategories, NewLabel
from vixml_jax.inference.predictor import Predictor
from vixml_jax.inference.queries import Query
from vixml_jax.mining.centroids import mean_of_rows
from vixml_jax.ragged import Ragged
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.label_index_blend import WordVectors
from vixml_jax.search.text_table import shown_text


@dataclasses.dataclass(frozen=True)
class EmbeddedLabels:
  """Embeddings of n new labels with m positives.

  Attributes:
    prototypes: float32 [n, D], unit norm.
    clusters: int32 [n], the free vector of each label.
    queries: float32 [m, D], embeddings of the positives.
    query_labels: Position of the label of each positive, m rows.
    words: TF-IDF vectors of labels and positives, for an index with a blend; None for any other.
  """

  prototypes: np.ndarray
  clusters: np.ndarray
  queries: np.ndarray
  query_labels: Ragged
  words: WordVectors | None


def ids_of_uids(index: LabelIndex, uids: Mapping[str, str]) -> np.ndarray:
  """Returns the ids of labels, int32, for uids from `read_uids`.

  Raises:
    InputError: A uid is unknown, or its label was deleted; the message names the line.
  """
  for (uid, where), found in zip(uids.items(), index.has(list(uids)), strict=True):
    if not found:
      try:
        index.ids_of([uid])
      except InputError as error:
        raise InputError(f"{where}: {error}") from error
  return index.ids_of(list(uids))


def check_new(index: LabelIndex, labels: Sequence[NewLabel], delete: Mapping[str, str]) -> None:
  """Checks that every new label has a uid of its own.

  Args:
    index: Index that the labels will be added to.
    labels: Labels to add.
    delete: Uids of labels that will be deleted in the same step, from `read_uids`.

  Raises:
    InputError: A uid belongs to another label; the message names the line.
  """
  seen: dict[str, str] = {}
  for label, taken in zip(labels, index.has([label.uid for label in labels]), strict=True):
    if label.uid in seen:
      raise InputError(f"{label.where}: uid {label.uid!r} is also that of {seen[label.uid]}; every label needs its own")
    seen[label.uid] = label.where
    if label.uid not in delete and taken:
      raise InputError(
        f"{label.where}: uid {label.uid!r} belongs to a label of {index.folder}; use another uid, or list this one in "
        "--delete as well to replace that label"
      )


def check_categories(
  index: LabelIndex, categories: Mapping[str, LabelCategories], labels: Sequence[NewLabel], delete: Mapping[str, str]
) -> None:
  """Checks that the labels of `read_categories` will exist.

  Args:
    index: Index of the labels.
    categories: Categories from `read_categories`.
    labels: Labels to add.
    delete: Uids of labels that will be deleted, from `read_uids`.

  Raises:
    InputError: A label will not exist; the message names the line.
  """
  new = {label.uid for label in labels}
  existing = {uid: given.where for uid, given in categories.items() if uid not in new}
  ids_of_uids(index, existing)
  for uid in existing.keys() & delete.keys():
    raise InputError(f"{existing[uid]}: label {uid!r} is to be deleted by {delete[uid]}; remove one of the lines")


def embed_labels(predictor: Predictor, labels: Sequence[NewLabel]) -> EmbeddedLabels:
  """Returns prototypes of new labels, computed as those of the labels of training; see `DualEncoder.prototypes`.

  A prototype is made of up to three vectors: the encoding of the label's text and images; the free vector of the
  cluster with the highest cosine of its mean embedding, among the clusters that training left, so that the order in
  which labels are added does not matter; and as its centroid the mean embedding of its positives, or its own embedding
  if it has none.

  Args:
    predictor: The trained encoder, and the index with the clusters.
    labels: Labels to embed.

  Raises:
    InputError: An image cannot be read; the message names the line.
  """
  vectors = predictor.image_vectors(labels, None) if predictor.encoder.images else None
  pooled = predictor.encoder.pooled([label.text for label in labels], vectors)
  own = normalize(pooled)
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
    _words(predictor.index, labels, positives),
  )


def _words(index: LabelIndex, labels: Sequence[NewLabel], positives: Sequence[Query]) -> WordVectors | None:
  """Returns the TF-IDF vectors of new labels and their positives, if the index has a blend."""
  if index.blend is None:
    return None
  tfidf = TfIdf(np.asarray(index.blend.idf))
  texts = ([label.text for label in labels], [query.text for query in positives])
  return WordVectors(*(tfidf.vectors(count_ngrams([part], len(tfidf.idf))) for part in texts))


def nearest_clusters(embeddings: np.ndarray, clusters: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Returns the cluster of highest cosine for each embedding, int32 [n]; the first one of equals.

  Args:
    embeddings: float32 [n, D].
    clusters: float32 [C, D], mean embedding of the labels of each cluster. A cluster without labels is zero and is
      never returned, unless there is no other: the index of a model without free vectors has one zero cluster.
    mesh: Devices to search on.
  """
  inhabited = np.flatnonzero(np.any(clusters, axis=1))
  if not len(inhabited):
    return np.zeros(len(embeddings), np.int32)
  _, ids = ExactIndex(normalize(np.asarray(clusters)), mesh, rows=inhabited).search(embeddings, 1)
  return ids[:, 0]


def add_labels(
  index: LabelIndex, labels: Sequence[NewLabel], embedded: EmbeddedLabels, delete: np.ndarray
) -> LabelIndex:
  """Adds labels and returns the next snapshot; see `LabelIndex.add`.

  Args:
    index: Index to add to.
    labels: Labels to add. Their positives become training queries, which retrieval-augmented inference searches.
    embedded: Embeddings of the same labels.
    delete: Ids of labels to delete in the same step.

  Raises:
    InputError: Another process has added a label of the same uid meanwhile.
  """
  categories = [label.categories or () for label in labels]
  return index.add(
    index.vectors_of(embedded.prototypes),
    [label.text for label in labels],
    [label.uid for label in labels],
    embedded.clusters,
    categories if any(categories) else None,
    queries=embedded.queries if len(embedded.queries) else None,
    query_labels=embedded.query_labels if len(embedded.queries) else None,
    query_texts=[shown_text(query.text) for label in labels for query in label.positives] or None,
    words=embedded.words,
    delete=delete,
  )


def change_labels(
  index: LabelIndex,
  predictor: Predictor | None,
  labels: Sequence[NewLabel],
  delete: Mapping[str, str],
  categories: Mapping[str, LabelCategories],
) -> LabelIndex:
  """Adds, deletes and categorizes labels, and returns the next snapshot; everything is checked before it is written.

  Args:
    index: Index to change.
    predictor: Encodes new labels; None if there are none.
    labels: Labels to add. One whose uid is in `delete` replaces that label.
    delete: Uids of labels to delete, from `read_uids`.
    categories: Categories of labels, which replace their former ones, from `read_categories`.

  Raises:
    InputError: A label does not exist, or a new one has the uid of another; the message names it.
  """
  ids = ids_of_uids(index, delete)
  check_new(index, labels, delete)
  check_categories(index, categories, labels, delete)
  if labels:
    assert predictor is not None
    index = add_labels(index, labels, embed_labels(predictor, labels), ids)
  elif len(ids):
    index = index.delete(ids)
  return set_categories(index, categories) if categories else index


def set_categories(index: LabelIndex, categories: Mapping[str, LabelCategories]) -> LabelIndex:
  """Replaces the categories of labels and returns the next snapshot.

  Args:
    index: Index of the labels.
    categories: Categories from `read_categories`.

  Raises:
    InputError: A uid is unknown, or its label was deleted; the message names the line.
  """
  ids = ids_of_uids(index, {uid: given.where for uid, given in categories.items()})
  return index.categorize(ids, [given.names for given in categories.values()])


def _centroids(own: np.ndarray, queries: np.ndarray, counts: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Returns the centroid of each label, float32 [n, D].

  Args:
    own: float32 [n, D], embeddings of the labels.
    queries: float32 [m, D], embeddings of all positives, label after label.
    counts: int [n], number of positives of each label.
    mesh: Devices that compute means, as in training.
  """
  if not len(queries):
    return own
  members = Ragged.of_lengths(np.arange(len(queries), dtype=np.int32), counts)
  return np.where(counts[:, None] > 0, sharding.to_host(mean_of_rows(queries, members, mesh=mesh))[: len(members)], own)
