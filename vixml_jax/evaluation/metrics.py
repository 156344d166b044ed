"""Ranking metrics of extreme classification: per query, over all queries, and by label frequency.

The definitions are those of pyxclib, with which the published numbers were computed. Values are in percent.

  P@k       hits among the first k, divided by k
  nDCG@k    sum of 1 / log2(rank + 1) over the hits, divided by its largest possible value, which is
            that of min(k, positives) hits at the first ranks
  PSP@k     hits weighted by inverse propensity, summed over ALL queries, divided by the same sum for
            the best possible ranking (a ratio of sums, not a mean of ratios)
  PSnDCG@k  nDCG@k with hits weighted by inverse propensity: mean over queries, divided by the mean
            for the best possible ranking
  R@k       hits among the first k, divided by the positives

These metrics have their usual definitions:

  MAP@k     sum of P@rank over the hits among the first k, divided by min(k, positives)
  MRR@k     1 / rank of the first hit, or 0 if there is none among the first k
  Hit@k     1 if there is a hit among the first k

Queries without positives count as 0 in every mean and add nothing to the sums of PSP and PSnDCG, as in pyxclib. Places
without a prediction (id -1) count as misses. MAP and MRR cannot be compared with pyxclib, whose MAP divides by the hits
found and whose MRR is 1 for a query without hits.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from vixml_jax.ragged import Ragged, ranges
from vixml_jax.search.membership import is_in_row

PRECISION_KS = (1, 3, 5)
RECALL_KS = (10, 100)
NUM_DECILES = 10
QUERIES_AT_ONCE = 16_384


@dataclasses.dataclass(frozen=True)
class QueryMetrics:
  """All metrics of all queries, as numerators and denominators that are summed over queries.

  Attributes:
    names: Names of the M metrics, such as `P@1`.
    numerators: Numerators float32 [Q, M].
    denominators: Best possible values float32 [Q, M'] of the M' metrics that are ratios of sums.
    ratios: Position in `names` of each of these M' metrics. All other metrics are means over queries.
  """

  names: tuple[str, ...]
  numerators: np.ndarray
  denominators: np.ndarray
  ratios: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.numerators)

  @classmethod
  def concatenate(cls, blocks: Sequence["QueryMetrics"]) -> "QueryMetrics":
    """Returns the metrics of the queries of all blocks, in order."""
    numerators, denominators = (
      np.concatenate([getattr(block, name) for block in blocks]) for name in ("numerators", "denominators")
    )
    return dataclasses.replace(blocks[0], numerators=numerators, denominators=denominators)

  def take(self, rows: np.ndarray) -> "QueryMetrics":
    """Returns the metrics of the given queries."""
    return dataclasses.replace(self, numerators=self.numerators[rows], denominators=self.denominators[rows])

  def totals(self, numerators: np.ndarray, denominators: np.ndarray, num_queries: int) -> np.ndarray:
    """Returns percentages [..., M] from sums over queries [..., M] and [..., M']."""
    below = np.full(numerators.shape, num_queries, np.float64)
    below[..., list(self.ratios)] = denominators
    return 100 * np.divide(numerators, below, out=np.zeros(below.shape), where=below > 0)

  def mean(self) -> dict[str, float]:
    """Returns each metric over all queries in percent."""
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
  """Returns the metrics of each query. Queries are compared in blocks, and no array is [Q, L].

  Args:
    ids: Labels int [Q, K] from best to worst, without repeats; -1 in places without a prediction.
    truth: Positives of each query, Q rows; a repeated label counts once.
    propensity: Inverse propensities [L].
    precision_ks: Values of k for P, nDCG, PSP and PSnDCG.
    recall_ks: Values of k for R. MAP, MRR and Hit are computed for both sets of k.

  Raises:
    ValueError: K is less than the largest k, or `ids` and `truth` have different numbers of rows.
  """
  largest = max(*precision_ks, *recall_ks)
  if ids.shape[1] < largest:
    raise ValueError(f"ids has {ids.shape[1]} predictions per query, too few for metrics at {largest}")
  if len(ids) != len(truth):
    raise ValueError(f"ids has {len(ids)} rows, but truth has {len(truth)}")
  names, ratios = _layout(precision_ks, recall_ks)
  numerators = np.empty((len(ids), len(names)), np.float32)
  denominators = np.empty((len(ids), len(ratios)), np.float32)
  for start in range(0, len(ids), QUERIES_AT_ONCE):
    rows = slice(start, min(start + QUERIES_AT_ONCE, len(ids)))
    block = _QueryBlock(ids[rows, :largest], _distinct(truth.take(np.arange(rows.start, rows.stop))), propensity)
    numerators[rows] = block.numerators(precision_ks, recall_ks)
    denominators[rows] = block.best(precision_ks)
  return QueryMetrics(names, numerators, denominators, ratios)


def evaluate(
  ids: np.ndarray,
  truth: Ragged,
  propensity: np.ndarray,
  *,
  precision_ks: Sequence[int] = PRECISION_KS,
  recall_ks: Sequence[int] = RECALL_KS,
) -> dict[str, float]:
  """Returns each metric over all queries in percent, by names such as `PSP@5`; see `query_metrics`.

  The first query finds one of its two labels at the first rank, the second finds its label at rank 3. Label 0 is rare:

  >>> truth = Ragged.from_rows([[1, 2], [0]])
  >>> ids = np.array([[1, 4, 5], [3, 4, 0]])
  >>> found = evaluate(ids, truth, np.array([9.0, 1, 1, 1, 1, 1]), precision_ks=(1, 3), recall_ks=(3,))
  >>> {name: round(found[name], 2) for name in ("P@1", "P@3", "R@3", "MRR@3", "PSP@1", "PSP@3")}
  {'P@1': 50.0, 'P@3': 33.33, 'R@3': 75.0, 'MRR@3': 66.67, 'PSP@1': 10.0, 'PSP@3': 90.91}
  """
  return query_metrics(ids, truth, propensity, precision_ks=precision_ks, recall_ks=recall_ks).mean()


def metrics_by_frequency(
  ids: np.ndarray,
  truth: Ragged,
  frequencies: np.ndarray,
  *,
  precision_ks: Sequence[int] = PRECISION_KS,
  recall_ks: Sequence[int] = RECALL_KS,
) -> list[dict[str, float | None]]:
  """Returns metrics of ten groups of labels by training frequency.

  Labels are sorted by (frequency, id) and divided into ten groups of equal size; the first group has the rarest labels.
  The metrics of a group are:

    P@k  hits on labels of the group among the first k, divided by k and by the number of queries; the
         values of the ten groups add up to P@k
    R@k  share of the pairs of a query and a positive of the group whose label is among the first k, a
         mean over pairs, so that queries without a positive in the group need no rule; None without pairs

  Args:
    ids: Labels int [Q, K] from best to worst; -1 in places without a prediction.
    truth: Positives of each query, Q rows.
    frequencies: Number of training queries of each label [L].
    precision_ks: Values of k for P.
    recall_ks: Values of k for R.

  Returns:
    A dict for each group with `decile` (1 to 10), `labels`, `min_frequency`, `max_frequency`, `positives` (number of
    pairs), and the metrics in percent. With fewer than ten labels, empty groups are left out.
  """
  counts = FrequencyCounts(frequencies, precision_ks, recall_ks)
  for start in range(0, len(ids), QUERIES_AT_ONCE):
    block = ids[start : start + QUERIES_AT_ONCE]
    counts.add(block, truth.take(np.arange(start, start + len(block))))
  return counts.rows()


class FrequencyCounts:
  """Hits and positives of groups of labels, counted over blocks of queries; see `metrics_by_frequency`."""

  def __init__(
    self, frequencies: np.ndarray, precision_ks: Sequence[int] = PRECISION_KS, recall_ks: Sequence[int] = RECALL_KS
  ):
    """Forms the groups; arguments as for `metrics_by_frequency`."""
    self._frequencies, self._precision_ks, self._recall_ks = frequencies, precision_ks, recall_ks
    order = np.argsort(frequencies, kind="stable")
    self._groups = [group for group in np.array_split(order, NUM_DECILES) if len(group)]
    self._group_of_label = np.empty(len(frequencies), np.int64)
    for number, group in enumerate(self._groups):
      self._group_of_label[group] = number
    self._depth = max(*precision_ks, *recall_ks)
    self._num_queries = 0
    self._positives = np.zeros(len(self._groups), np.int64)
    self._hits_at_rank = np.zeros((len(self._groups), self._depth), np.int64)

  def add(self, ids: np.ndarray, truth: Ragged) -> None:
    """Counts a block of queries: the labels found [Q, K], and the positives, Q rows."""
    ids, truth = ids[:, : self._depth], _distinct(truth)
    self._num_queries += len(ids)
    self._positives += np.bincount(self._group_of_label[truth.values], minlength=len(self._groups))
    queries, ranks = np.nonzero(is_in_row(ids, truth))
    np.add.at(self._hits_at_rank, (self._group_of_label[ids[queries, ranks]], ranks), 1)

  def rows(self) -> list[dict[str, float | None]]:
    """Returns the result of `metrics_by_frequency` for all queries so far."""
    found = self._hits_at_rank.cumsum(1)
    result = []
    for number, group in enumerate(self._groups):
      pairs = int(self._positives[number])
      row: dict[str, float | None] = {
        "decile": number + 1,
        "labels": len(group),
        "min_frequency": int(self._frequencies[group[0]]),
        "max_frequency": int(self._frequencies[group[-1]]),
        "positives": pairs,
      }
      for k in self._precision_ks:
        row[f"P@{k}"] = 100 * float(found[number, k - 1]) / (k * max(self._num_queries, 1))
      for k in self._recall_ks:
        row[f"R@{k}"] = 100 * float(found[number, k - 1]) / pairs if pairs else None
      result.append(row)
    return result


def _layout(precision_ks: Sequence[int], recall_ks: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
  """Returns the names of the columns of `_QueryBlock.numerators`, and which of them are ratios of sums."""
  ratios = [f"{name}@{k}" for name in ("PSP", "PSnDCG") for k in precision_ks]
  plain = [f"{name}@{k}" for name in ("P", "nDCG") for k in precision_ks]
  plain += [f"R@{k}" for k in recall_ks]
  plain += [f"{name}@{k}" for name in ("MAP", "MRR", "Hit") for k in _all_ks(precision_ks, recall_ks)]
  return (*ratios, *plain), tuple(range(len(ratios)))


def _all_ks(precision_ks: Sequence[int], recall_ks: Sequence[int]) -> list[int]:
  return sorted({*precision_ks, *recall_ks})


class _QueryBlock:
  """Metrics of a block of queries; cumulative sums over ranks serve all k."""

  def __init__(self, ids: np.ndarray, truth: Ragged, propensity: np.ndarray):
    self.hits = is_in_row(ids, truth)
    self.weights = np.where(self.hits, propensity[ids], 0)  # Places with id -1 are never hits.
    self.truth = truth
    self.positives = truth.lengths[:, None]
    self.ranks = np.arange(1, ids.shape[1] + 1)
    self.discounts = 1 / np.log2(self.ranks + 1)
    self.propensity = propensity

  def numerators(self, precision_ks: Sequence[int], recall_ks: Sequence[int]) -> np.ndarray:
    """Returns the columns of `_layout`, [Q, M]."""
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

  def best(self, precision_ks: Sequence[int]) -> np.ndarray:
    """Returns PSP and PSnDCG of the best possible ranking, whose first labels are the positives of largest weight."""
    at = np.asarray(precision_ks) - 1
    best = self._largest_weights(at.max() + 1)
    return np.concatenate([best.cumsum(1)[:, at] / self.ranks[at], self._ndcg(best, at)], axis=1)

  def _ndcg(self, gains: np.ndarray, at: np.ndarray) -> np.ndarray:
    width = at.max() + 1
    gained = (gains[:, :width] * self.discounts[:width]).cumsum(1)[:, at]
    largest = self.discounts.cumsum()
    return gained / largest[np.clip(np.minimum(at + 1, self.positives), 1, None) - 1]

  def _largest_weights(self, width: int) -> np.ndarray:
    """Returns the `width` largest weights of the positives of each query in descending order, padded with 0."""
    weights = self.propensity[self.truth.values]
    rows = self.truth.row_ids()
    order = np.lexsort((-weights, rows))
    ranks = ranges(0, self.truth.lengths)
    result = np.zeros((len(self.truth), width))
    kept = ranks < width
    result[rows[kept], ranks[kept]] = weights[order][kept]
    return result


def _distinct(rows: Ragged) -> Ragged:
  """Returns rows with the same values, sorted and without repeats."""
  if len(rows.values) == 0:
    return rows
  stride = int(rows.values.max()) + 1
  keys = np.sort(rows.row_ids() * stride + rows.values)
  keys = keys[np.append(True, keys[1:] != keys[:-1])]  # np.unique hashes, which takes several times as long.
  row_ids, values = np.divmod(keys, stride)
  return Ragged(values, np.searchsorted(row_ids, np.arange(len(rows) + 1)))
