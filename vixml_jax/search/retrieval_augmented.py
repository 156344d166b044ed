"""Retrieval-augmented inference: labels scored by their prototypes and by similar training queries together.

ViXML (arXiv 2511.13189), "Retrieval-augmented inference". A query searches the labels and the
training queries, each for its nearest neighbors. The scores of both are joined and softmaxed,
and the mass of a training query goes in full to each of its own labels:

  score(l) = lambda * mass(l) + (1 - lambda) * sum of mass(n) over neighbors n that have label l

The searches do not depend on lambda and the temperature, so these can be tried at little cost.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np
import scipy.sparse
import tqdm

from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import evaluate
from vixml_jax.ragged import Ragged, offsets_of
from vixml_jax.search.filters import Filters
from vixml_jax.search.host_search import greatest
from vixml_jax.search.index import Index, search_excluding
from vixml_jax.search.membership import drop_members

HITS = 100
LAMBDAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
_QUERIES_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """Results of both searches for Q queries, in descending order of score; id -1 and score -inf where there is none.

  Attributes:
    label_scores: float32 [Q, K].
    label_ids: int32 [Q, K].
    query_scores: float32 [Q, K'].
    query_ids: int32 [Q, K'], training queries.
  """

  label_scores: np.ndarray
  label_ids: np.ndarray
  query_scores: np.ndarray
  query_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Setting:
  """Weight of the labels (1 - lambda_ is that of the training queries), temperature, and the metrics they give."""

  lambda_: float
  temperature: float
  metrics: dict[str, float]


def search_both(
  label_index: Index,
  query_index: Index,
  queries: np.ndarray | jax.Array,
  *,
  label_hits: int = HITS,
  query_hits: int = HITS,
  exclude_queries: Ragged | None = None,
) -> Neighbors:
  """The two searches, which all settings share.

  Args:
    label_index: of the labels' prototypes, [L, D].
    query_index: of the training queries' embeddings, [N, D], as plain as the queries.
    queries: [Q, D], unit length, so that scores are cosines.
    label_hits: K.
    query_hits: K'.
    exclude_queries: for each query the training queries that it must not find (itself, say), Q rows.
  """
  labels = search_excluding(label_index, queries, label_hits, None)
  return Neighbors(*labels, *search_excluding(query_index, queries, query_hits, exclude_queries))


def combine(
  neighbors: Neighbors,
  labels_of_queries: Ragged,
  *,
  num_labels: int,
  lambda_: float,
  temperature: float,
  k: int,
  exclude: Ragged | None = None,
  filters: Filters | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Turns the neighbors into a ranking of labels.

  Excluded labels take part in the softmax, as in the published code, and are dropped before
  the cut at k, which the published code is not. A label without mass is not ranked.

  Works on the host, 2,048 queries at a time, sparse: nothing is Q x L or Q x N.

  Args:
    neighbors: of Q queries.
    labels_of_queries: labels of the N training queries, each at most once a row.
    num_labels: L.
    lambda_: weight of the labels' own mass, 0 to 1.
    temperature: divides the scores before the softmax, above 0.
    k: how many labels.
    exclude: for each query the labels to leave out, Q rows.
    filters: which labels each query may have. Where the label search kept to them as well (`LabelIndex.search` does),
      a query finds up to K of the labels that it may have, however few these are.

  Returns:
    scores float32 [Q, K] in descending order and ids int32 [Q, K], the lower id first where
    scores are equal; score -inf and id -1 where fewer labels have mass.

  Raises:
    InputError: if lambda_ or temperature is out of range.
  """
  check_setting(lambda_, temperature)
  num_queries = len(neighbors.label_ids)
  scores = np.empty((num_queries, k), np.float32)
  ids = np.empty((num_queries, k), np.int32)
  with tqdm.tqdm(total=num_queries, desc="combine", unit="query", disable=None, leave=False) as progress:
    for start in range(0, num_queries, _QUERIES_AT_ONCE):
      rows = slice(start, min(start + _QUERIES_AT_ONCE, num_queries))
      label_mass, query_mass = _softmax(neighbors.label_scores[rows], neighbors.query_scores[rows], temperature)
      mass = _mass_of_labels(
        lambda_ * label_mass,
        neighbors.label_ids[rows],
        (1 - lambda_) * query_mass,
        neighbors.query_ids[rows],
        labels_of_queries,
        num_labels,
      )
      excluded = None if exclude is None else exclude.take(np.arange(rows.start, rows.stop))
      permitted = None if filters is None else filters.take(np.arange(rows.start, rows.stop))
      scores[rows], ids[rows] = _rank(mass, k, excluded, permitted)
      progress.update(rows.stop - rows.start)
  return scores, ids


def choose(
  neighbors: Neighbors,
  labels_of_queries: Ragged,
  truth: Ragged,
  propensity: np.ndarray,
  *,
  lambdas: Sequence[float] = LAMBDAS,
  temperatures: Sequence[float] = TEMPERATURES,
  metric: str = "P@1",
  exclude: Ragged | None = None,
) -> tuple[Setting, list[Setting]]:
  """Tries every lambda with every temperature on held-out queries.

  Args:
    neighbors: of held-out queries, which must not have found themselves (`exclude_queries`).
    labels_of_queries: labels of the training queries.
    truth: positives of the held-out queries, Q rows.
    propensity: inverse propensities, [L].
    lambdas: weights to try.
    temperatures: temperatures to try.
    metric: the one to choose by (see `pick`), such as "P@1".
    exclude: for each held-out query the labels to leave out, Q rows.

  Returns:
    the chosen setting, and all of them with P@1, PSP@1, R@100 and `metric`, to see what is traded.

  Raises:
    InputError: if there is no such metric, or a lambda or temperature is out of range.
  """
  settings = []
  for temperature in temperatures:
    for lambda_ in lambdas:
      _, ids = combine(
        neighbors,
        labels_of_queries,
        num_labels=len(propensity),
        lambda_=lambda_,
        temperature=temperature,
        k=100,
        exclude=exclude,
      )
      metrics = evaluate(ids, truth, propensity)
      if metric not in metrics:
        raise InputError(f"metric {metric!r} to choose lambda and temperature by is not one of {', '.join(metrics)}")
      shown = dict.fromkeys(("P@1", "PSP@1", "R@100", metric))
      settings.append(Setting(lambda_, temperature, {name: metrics[name] for name in shown}))
  return pick(settings, metric, len(truth)), settings


def pick(settings: Sequence[Setting], metric: str, num_queries: int) -> Setting:
  """The setting with the greatest R@100 among those that are not measurably worse than the best in `metric`.

  Many settings lie within the noise of a few hundred held-out queries; of these, the one that finds most serves
  whatever ranks further. "Not measurably worse": within one standard error of the best, which is at most
  sqrt(p (1 - p) / Q) for a metric of mean p (Breiman et al. 1984, the one-standard-error rule). Of equals, the first.

  Args:
    settings: with `metric` and R@100, in percent.
    metric: the one to choose by.
    num_queries: Q, behind each mean.
  """
  best = max(setting.metrics[metric] for setting in settings)
  share = best / 100
  floor = best - 100 * math.sqrt(max(share * (1 - share), 0.0) / num_queries)
  return max((s for s in settings if s.metrics[metric] >= floor), key=lambda setting: setting.metrics["R@100"])


def check_setting(lambda_: float, temperature: float) -> None:
  """Refuses a weight or a temperature out of range."""
  if not 0 <= lambda_ <= 1:
    raise InputError(f"lambda of retrieval-augmented inference is {lambda_}: it must lie between 0 and 1")
  if not temperature > 0:
    raise InputError(f"temperature of retrieval-augmented inference is {temperature}: it must be above 0")


def _softmax(label_scores: np.ndarray, query_scores: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
  """One softmax over both lists of scores; float64, where a score of -inf gets nothing."""
  joined = np.concatenate([label_scores, query_scores], axis=1).astype(np.float64)
  highest = joined.max(axis=1, keepdims=True)
  mass = np.exp((joined - np.where(np.isfinite(highest), highest, 0)) / temperature)
  mass /= np.maximum(mass.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
  return mass[:, : label_scores.shape[1]], mass[:, label_scores.shape[1] :]


def _mass_of_labels(
  label_mass, label_ids, query_mass, query_ids, labels_of_queries: Ragged, num_labels: int
) -> scipy.sparse.csr_array:
  """Sparse [Q, L]: every label's own mass and that of the training queries that have it.

  One product of sparse matrices: [Q, label hits + query hits] @ [label hits + query hits, L], where
  a label hit has itself as its only label.
  """
  own, own_columns = _distinct_hits(label_ids)
  found, found_columns = _distinct_hits(query_ids)
  labels = labels_of_queries.take(found)
  has_label = scipy.sparse.csr_array(
    (
      np.ones(len(own) + len(labels.values)),
      np.concatenate([own, labels.values]),
      np.concatenate([np.arange(len(own)), len(own) + labels.offsets]),
    ),
    shape=(len(own) + len(found), num_labels),
  )
  found_columns = np.where(found_columns < 0, -1, len(own) + found_columns)
  mass = np.concatenate([label_mass, query_mass], axis=1)
  columns = np.concatenate([own_columns, found_columns], axis=1)
  kept = (columns >= 0) & (mass > 0)
  offsets = offsets_of(kept.sum(axis=1))
  shape = (len(mass), len(own) + len(found))
  return scipy.sparse.csr_array((mass[kept], columns[kept], offsets), shape=shape) @ has_label


def _distinct_hits(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The ids that occur, ascending, and for every place the position of its id among them; -1 where there is none."""
  distinct, positions = np.unique(np.maximum(ids, 0), return_inverse=True)
  return distinct, np.where(ids < 0, -1, positions.reshape(ids.shape))


def _rank(
  mass: scipy.sparse.csr_array, k: int, exclude: Ragged | None, filters: Filters | None
) -> tuple[np.ndarray, np.ndarray]:
  """The k greatest of each sparse row that are not excluded, and that the filters permit."""
  mass.sort_indices()
  lengths = np.diff(mass.indptr)
  # As many more as can be excluded, so that k are left: see search_excluding.
  wanted = k if exclude is None else k + int(exclude.lengths.max(initial=0))
  places = np.arange(max(wanted, int(lengths.max(initial=0)))) < lengths[:, None]
  ids = np.full(places.shape, -1, np.int32)
  scores = np.full(places.shape, -np.inf)
  ids[places], scores[places] = mass.indices, mass.data
  if filters is not None:
    permitted = filters.permits(ids)
    ids, scores = np.where(permitted, ids, -1), np.where(permitted, scores, -np.inf)
  kept = greatest(scores, wanted)
  scores, ids = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)
  if exclude is not None:
    scores, ids = drop_members(scores, ids, exclude, k)
  return scores.astype(np.float32), ids
