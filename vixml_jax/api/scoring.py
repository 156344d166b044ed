"""Metrics of a model on labeled queries that need not be those of its run."""

from collections.abc import Iterable, Sequence
import itertools

import numpy as np

from vixml_jax.datasets.propensity import inverse_propensity
from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import QueryMetrics, query_metrics
from vixml_jax.inference.predictor import GivenQuery, Predictor
from vixml_jax.ragged import Ragged
from vixml_jax.search.label_index import LabelIndex

Labeled = tuple[GivenQuery, Sequence[str]]
"""A query, and the uids of its labels."""
_QUERIES_AT_ONCE = 4096


def score(
  predictor: Predictor, queries: Iterable[Labeled], *, ks: Sequence[int], recall_ks: Sequence[int]
) -> dict[str, float]:
  """Returns the metrics of `evaluation.metrics` over all queries, in percent.

  Queries are read, answered and scored block by block.

  Args:
    predictor: The model, with the ranking to score.
    queries: Queries and the uids of their labels.
    ks: Values of k for P, nDCG, PSP and PSnDCG.
    recall_ks: Values of k for R.

  Raises:
    InputError: There are no queries, a query is wrong, or the model does not know a label.
  """
  propensity = _propensity(predictor)
  # Without training queries in the index, frequencies are unknown, and so is what a rare label counts.
  weights = np.ones(predictor.index.num_labels) if propensity is None else propensity
  blocks: list[QueryMetrics] = []
  queries, first = iter(queries), 0
  while block := list(itertools.islice(queries, _QUERIES_AT_ONCE)):
    truth = _truth(predictor.index, block, first)
    ids = _ranked(predictor, block, first, max(*ks, *recall_ks))
    blocks.append(query_metrics(ids, truth, weights, precision_ks=ks, recall_ks=recall_ks))
    first += len(block)
  if not blocks:
    raise InputError("queries: there are none to evaluate; give at least one")
  found = QueryMetrics.concatenate(blocks).mean()
  return found if propensity is not None else {name: found[name] for name in found if not name.startswith("PS")}


def _ranked(predictor: Predictor, block: Sequence[Labeled], first: int, depth: int) -> np.ndarray:
  """Returns the ids of the best labels of each query, int32 [Q, depth]; -1 in places without a label."""
  checked = predictor.checked([query for query, _ in block], first)
  k = min(depth, predictor.index.num_live)
  texts = [query.text for query in checked]
  _, ids = predictor.search(predictor.encode(checked), k, predictor.filters(checked), texts=texts)
  return np.pad(ids, [(0, 0), (0, depth - ids.shape[1])], constant_values=-1)


def _truth(index: LabelIndex, block: Sequence[Labeled], first: int) -> Ragged:
  """Returns the ids of the labels of each query."""
  uids = [uid for _, labels in block for uid in labels]
  known = index.has(uids)
  if not known.all():
    wrong = int(np.argmin(known))
    row = int(np.searchsorted(np.cumsum([len(labels) for _, labels in block]), wrong, side="right"))
    raise InputError(
      f"query {first + row}: the model has no label {uids[wrong]!r}; add it with add_labels, or leave it out"
    )
  return Ragged.of_lengths(index.ids_of(uids), [len(labels) for _, labels in block])


def _propensity(predictor: Predictor) -> np.ndarray | None:
  """Returns the inverse propensities of the labels, as in the run; None if the index has no training queries."""
  index, config = predictor.index, predictor.encoder.config
  if index.retrieval is None and index.blend is None:
    return None
  frequencies = np.bincount(index.query_labels.values, minlength=index.num_labels)
  return inverse_propensity(
    frequencies, len(index.query_labels), config.dataset.propensity_a, config.dataset.propensity_b
  )
