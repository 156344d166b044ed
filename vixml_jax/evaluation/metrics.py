"""Ranking metrics of extreme classification, for each query and over all, by label frequency too.

Definitions are those of pyxclib, which the published numbers come from, in percent:

  P@k       hits among the first k, divided by k
  nDCG@k    sum of 1 / log2(rank + 1) over the hits, divided by its greatest value, that of
            min(k, positives) hits in front
  PSP@k     hits weighted by inverse propensity, summed over ALL queries, divided by the same
            sum for the best possible ranking (a ratio of sums, not a mean of ratios)
  PSnDCG@k  nDCG@k with hits weighted by inverse propensity: mean over queries divided by the
            mean for the best possible ranking
  R@k       hits among the first k, divided by the positives

and, which pyxclib does not have, in their usual form:

  MAP@k     sum of P@rank over the hits among the first k, divided by min(k, positives)
  MRR@k     1 / rank of the first hit, 0 if that is beyond k
  Hit@k     1 if there is a hit among the first k

Queries without positives count as 0 in every mean, and add nothing to either sum of PSP and
PSnDCG, as in pyxclib. Places without a prediction (id -1) count as misses.
(pyxclib's MAP in the published code divides by the hits found instead, and its MRR gives a
query without any hit 1; ours do not, so these two do not compare with it.)
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from vixml_jax.ragged import Ragged, ranges
from vixml_jax.search.membership import is_in_row

PRECISION_KS = (1, 3, 5)
RECALL_KS = (10, 100)
NUM_DECILES = 10
_QUERIES_AT_ONCE = 16_384


def inverse_propensity(frequencies: np.ndarray, num_queries: int, a: float, b: float) -> np.ndarray:
  """How much rarer labels weigh: 1 + (log N - 1) (B + 1)^A (frequency + B)^-A.

  Jain et al., Extreme multi-label loss functions, KDD 2016. Amazon sets: A 0.6, B 2.6;
  Wikipedia: 0.5, 0.4; all else: 0.55, 1.5.

  Args:
    frequencies: for each label its number of training queries, [L].
    num_queries: N, training queries, with or without labels.
    a: A.
    b: B.

  Returns:
    float64 [L].
  """
  scale = (np.log(num_queries) - 1) * (b + 1) ** a
  return 1 + scale * (np.asarray(frequencies, np.float64) + b) ** -a


@dataclasses.dataclass(frozen=True)
class QueryMetrics:
  """Every metric of every query, as a share whose numerators and denominators are summed.

  Attributes:
    names: M metrics, such as `P@1`.
    numerators: float32 [Q, M].
    denominators: float32 [Q, M']: the best possible value, for those M' metrics that are ratios of sums.
    ratios: for each of the M' columns the position of its metric in `names`. All other
      metrics are plain means over queries.
  """

  names: tuple[str, ...]
  numerators: np.ndarray
  denominators: np.ndarray
  ratios: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.numerators)

  def take(self, rows: np.ndarray) -> "QueryMetrics":
    """The same for some of the queries."""
    return dataclasses.replace(self, numerators=self.numerators[rows], denominators=self.denominators[rows])

  def totals(self, numerators: np.ndarray, denominators: np.ndarray, num_queries: int) -> np.ndarray:
    """Percentages from sums over queries: [..., M] and [..., M'] -> [..., M]."""
    below = np.full(numerators.shape, num_queries, np.float64)
    below[..., list(self.ratios)] = denominators
    return 100 * np.divide(numerators, below, out=np.zeros(below.shape), where=below > 0)

  def mean(self) -> dict[str, float]:
    """Every metric over all queries, in percent."""
    numerators = self.numerators.sum(0, dtype=np.float64)
    values = self.totals(numerators, self.denominators.sum(0, dtype=np.float64), len(self))
    return dict(zip(self.names, values.tolist(), strict=True))


def query_metrics(
  ids: np.ndarray,
  truth: Ragged,
  propensity: np.ndarray,
  *,
  precision_ks: Sequence[int] = PRECISION_KS,
  recall_ks: Sequence[int] = RECALL_KS,
) -> QueryMetrics:
  """Compares rankings with the truth, a block of queries at a time; nothing is Q x L.

  Args:
    ids: int [Q, K], labels from best to worst, none twice; -1 where there is none.
    truth: the positives of each query, Q rows; a label that stands twice in a row counts once.
    propensity: inverse propensities, [L].
    precision_ks: k of P, nDCG, PSP and PSnDCG.
    recall_ks: k of R. MAP, MRR and Hit are given at both sets of k.

  Raises:
    ValueError: if K is less than the greatest k, or the rows differ in number.
  """
  largest = max(*precision_ks, *recall_ks)
  if ids.shape[1] < largest:
    raise ValueError(f"{ids.shape[1]} predictions a query do not suffice for metrics at {largest}")
  if len(ids) != len(truth):
    raise ValueError(f"{len(ids)} predictions but {len(truth)} rows of truth")
  names, ratios = _layout(precision_ks, recall_ks)
  numerators = np.empty((len(ids), len(names)), np.float32)
  denominators = np.empty((len(ids), len(ratios)), np.float32)
  for start in range(0, len(ids), _QUERIES_AT_ONCE):
    rows = slice(start, min(start + _QUERIES_AT_ONCE, len(ids)))
    block = _Block(ids[rows, :largest], _distinct(truth.take(np.arange(rows.start, rows.stop))), propensity)
    numerators[rows] = block.numerators(precision_ks, recall_ks)
    denominators[rows] = block.best(precision_ks)
  return QueryMetrics(names, numerators, denominators, ratios)


def evaluate(ids: np.ndarray, truth: Ragged, propensity: np.ndarray, **ks) -> dict[str, float]:
  """`query_metrics(...).mean()`: every metric in percent, with keys such as `PSP@5`."""
  return query_metrics(ids, truth, propensity, **ks).mean()


def metrics_by_frequency(
  ids: np.ndarray,
  truth: Ragged,
  frequencies: np.ndarray,
  *,
  precision_ks: Sequence[int] = PRECISION_KS,
  recall_ks: Sequence[int] = RECALL_KS,
) -> list[dict[str, float | None]]:
  """How well rare and frequent labels are found: ten groups of labels by training frequency.

  Labels in ascending order of (frequency, id) are cut into ten groups of equal size, the first
  holding the rarest. Of each group:

    P@k  its share of P@k: hits on its labels among the first k, divided by k and by all
         queries; the ten shares add up to P@k
    R@k  of all pairs of a query and a positive of this group, how many have the label among
         the first k (a mean over pairs, so that it exists without a rule for queries that
         have no positive here); None if there is no such pair

  Args:
    ids: int [Q, K], labels from best to worst; -1 where there is none.
    truth: the positives of each query, Q rows.
    frequencies: for each label its number of training queries, [L].
    precision_ks: k of P.
    recall_ks: k of R.

  Returns:
    ten dicts with keys `decile` (1 to 10), `labels`, `min_frequency`, `max_frequency`,
    `positives` (pairs), and the metrics in percent. With fewer than ten labels, empty groups are left out.
  """
  order = np.argsort(frequencies, kind="stable")
  groups = [group for group in np.array_split(order, NUM_DECILES) if len(group)]
  group_of_label = np.empty(len(frequencies), np.int64)
  for number, group in enumerate(groups):
    group_of_label[group] = number
  ids = ids[:, : max(*precision_ks, *recall_ks)]
  positives = np.zeros(len(groups), np.int64)
  hits_at_rank = np.zeros((len(groups), ids.shape[1]), np.int64)
  for start in range(0, len(ids), _QUERIES_AT_ONCE):
    block_ids = ids[start : start + _QUERIES_AT_ONCE]
    block_truth = _distinct(truth.take(np.arange(start, start + len(block_ids))))
    positives += np.bincount(group_of_label[block_truth.values], minlength=len(groups))
    queries, ranks = np.nonzero(is_in_row(block_ids, block_truth))
    np.add.at(hits_at_rank, (group_of_label[block_ids[queries, ranks]], ranks), 1)
  found = hits_at_rank.cumsum(1)
  result = []
  for number, group in enumerate(groups):
    pairs = int(positives[number])
    row: dict[str, float | None] = {
      "decile": number + 1,
      "labels": len(group),
      "min_frequency": int(frequencies[group[0]]),
      "max_frequency": int(frequencies[group[-1]]),
      "positives": pairs,
    }
    for k in precision_ks:
      row[f"P@{k}"] = 100 * float(found[number, k - 1]) / (k * max(len(ids), 1))
    for k in recall_ks:
      row[f"R@{k}"] = 100 * float(found[number, k - 1]) / pairs if pairs else None
    result.append(row)
  return result


def _layout(precision_ks, recall_ks) -> tuple[tuple[str, ...], tuple[int, ...]]:
  """Names of the columns, and which of them are ratios of sums; the order of `_Block.numerators`."""
  ratios = [f"{name}@{k}" for name in ("PSP", "PSnDCG") for k in precision_ks]
  plain = [f"{name}@{k}" for name in ("P", "nDCG") for k in precision_ks]
  plain += [f"R@{k}" for k in recall_ks]
  plain += [f"{name}@{k}" for name in ("MAP", "MRR", "Hit") for k in _all_ks(precision_ks, recall_ks)]
  return (*ratios, *plain), tuple(range(len(ratios)))


def _all_ks(precision_ks, recall_ks) -> list[int]:
  return sorted({*precision_ks, *recall_ks})


class _Block:
  """The metrics of a block of queries; sums over ranks are cumulated once for all k."""

  def __init__(self, ids: np.ndarray, truth: Ragged, propensity: np.ndarray):
    self.hits = is_in_row(ids, truth)
    self.weights = np.where(self.hits, propensity[ids], 0)  # ids of -1 are no hits
    self.truth = truth
    self.positives = truth.lengths[:, None]
    self.ranks = np.arange(1, ids.shape[1] + 1)
    self.discounts = 1 / np.log2(self.ranks + 1)
    self.propensity = propensity

  def numerators(self, precision_ks, recall_ks) -> np.ndarray:
    at = np.asarray(precision_ks) - 1
    recall_at = np.asarray(recall_ks) - 1
    all_at = np.asarray(_all_ks(precision_ks, recall_ks)) - 1
    found = self.hits.cumsum(1)
    precision = found / self.ranks
    possible = np.clip(np.minimum(self.ranks, self.positives), 1, None)
    first = np.where(self.hits.any(1), self.hits.argmax(1), len(self.ranks))[:, None]
    return np.concatenate(
      [
        self.weights.cumsum(1)[:, at] / self.ranks[at],
        self._ndcg(self.weights, at),
        precision[:, at],
        self._ndcg(self.hits, at),
        found[:, recall_at] / np.maximum(self.positives, 1),
        ((self.hits * precision).cumsum(1) / possible)[:, all_at],
        np.where(first <= all_at, 1 / (first + 1), 0),
        found[:, all_at] > 0,
      ],
      axis=1,
    )

  def best(self, precision_ks) -> np.ndarray:
    """PSP and PSnDCG of the best possible ranking: the positives of the greatest weights in front."""
    at = np.asarray(precision_ks) - 1
    best = self._greatest_weights(at.max() + 1)
    return np.concatenate([best.cumsum(1)[:, at] / self.ranks[at], self._ndcg(best, at)], axis=1)

  def _ndcg(self, gains: np.ndarray, at: np.ndarray) -> np.ndarray:
    width = at.max() + 1
    gained = (gains[:, :width] * self.discounts[:width]).cumsum(1)[:, at]
    greatest = self.discounts.cumsum()
    return gained / greatest[np.clip(np.minimum(at + 1, self.positives), 1, None) - 1]

  def _greatest_weights(self, width: int) -> np.ndarray:
    """The `width` greatest weights among each query's positives, in descending order, else 0."""
    weights = self.propensity[self.truth.values]
    rows = self.truth.row_ids()
    order = np.lexsort((-weights, rows))
    ranks = ranges(0, self.truth.lengths)
    result = np.zeros((len(self.truth), width))
    kept = ranks < width
    result[rows[kept], ranks[kept]] = weights[order][kept]
    return result


def _distinct(rows: Ragged) -> Ragged:
  """The same rows in ascending order and without repeats."""
  if len(rows.values) == 0:
    return rows
  stride = int(rows.values.max()) + 1
  keys = np.sort(rows.row_ids() * stride + rows.values)
  keys = keys[np.append(True, keys[1:] != keys[:-1])]  # np.unique hashes, at several times the cost
  row_ids, values = np.divmod(keys, stride)
  return Ragged(values, np.searchsorted(row_ids, np.arange(len(rows) + 1)))
