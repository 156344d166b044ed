"""Recall of ScaNN against exact search: measured on a sample of queries, and reached by choosing how ScaNN searches."""

from collections.abc import Callable
import dataclasses
import functools
import logging
import math
import time
from typing import Any, NamedTuple

import numpy as np

from vixml_jax.rounding import at_equal_distances
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.membership import overlap
from vixml_jax.search.scann_index import ScannIndex

RECALL_AT = (10, 100)
SAMPLE_SIZE = 1_000
"""Maximum number of queries in a sample; settings are chosen on one half, and recall is measured on the other."""
_REORDER = (20, 10, 5, 2, 1)  # Number of candidates whose exact scores are computed, in multiples of k.
_FIRST_SHARE = 1 / 64  # Share of the leaves that is tried first.
_PRECISION = 1 / 16  # The fewest leaves that suffice are found within this share.
_SLOWER = 1.5  # A number of candidates is given up once it takes this many times as long as the fastest setting.

_log = logging.getLogger(__name__)


class QuerySample(NamedTuple):
  """Queries that stand for those that will be searched.

  Attributes:
    queries: float32 [S, D].
    of: What they are, such as "held-out queries".
  """

  queries: np.ndarray
  of: str

  def halves(self) -> tuple["QuerySample", "QuerySample"]:
    """Returns every second query, and the others; a single query is in both."""
    others = self.queries[1::2] if len(self.queries) > 1 else self.queries
    return QuerySample(self.queries[::2], self.of), QuerySample(others, self.of)


class RecallGoal(NamedTuple):
  """A recall that ScaNN must reach.

  Attributes:
    recall: Share of the 100 best labels to find, above 0 and below 1.
    sample: Queries to choose the settings of search on.
  """

  recall: float
  sample: QuerySample


def sample_rows(number: int) -> np.ndarray:
  """Returns the rows of a sample of `number` queries, int64 [S], at equal distances."""
  return at_equal_distances(number, SAMPLE_SIZE)


def recall_sample(
  embeddings: np.ndarray, deleted: np.ndarray, queries: np.ndarray | None, held_out: np.ndarray | None
) -> QuerySample:
  """Returns queries to measure the recall of ScaNN on: held-out ones, or else training queries, or else labels.

  Args:
    embeddings: float32 [L, D], embeddings of all labels.
    deleted: bool [L], whether each label is deleted.
    queries: float32 [N, D], embeddings of the training queries; None if there are none.
    held_out: float32 [S, D], a sample of queries that were not trained on; None if there is none.
  """
  if held_out is not None:
    return QuerySample(held_out, "held-out queries")
  if queries is not None:
    return QuerySample(queries[sample_rows(len(queries))], "training queries")
  live = np.flatnonzero(~deleted)
  return QuerySample(embeddings[live[sample_rows(len(live))]], "labels")


def recall_goal(recall: float, sample: QuerySample) -> RecallGoal | None:
  """Returns the recall that ScaNN must reach, on the half of the sample that settings are chosen on; None for 0."""
  return RecallGoal(recall, sample.halves()[0]) if recall else None


def measure_recall(scann: ScannIndex, exact: ExactIndex, sample: QuerySample) -> dict[str, Any]:
  """Returns the share of the labels of exact search that ScaNN finds, and logs it.

  Args:
    scann: ScaNN over the labels.
    exact: Exact search of the same labels.
    sample: Queries to measure it on.

  Returns:
    `recall@10` and `recall@100` in percent; `queries_per_second`; `queries`, the size of the sample; and `of`, what it
    consists of.
  """
  k = min(max(RECALL_AT), scann.num_labels)
  _, exact_ids = exact.search(sample.queries, k)
  start = time.perf_counter()
  _, ids = scann.search(sample.queries, k)
  rate = len(ids) / (time.perf_counter() - start)
  recall = {f"recall@{at}": 100 * overlap(ids[:, :at], exact_ids[:, :at]) for at in RECALL_AT}
  _log.info(
    "recall of ScaNN against exact search: %s, on %s %s, at %.0f queries/s",
    ", ".join(f"{value:.2f} % ({metric})" for metric, value in recall.items()),
    f"{len(ids):,}",
    sample.of,
    rate,
  )
  return recall | {"queries_per_second": round(rate, 1), "queries": len(ids), "of": sample.of}


class _Trial(NamedTuple):
  """A setting that was tried.

  Attributes:
    leaves: Number of leaves that a query visits; 0 without a tree.
    reorder: Number of candidates whose exact scores are computed.
    recall: Mean recall of the queries.
    sure: Mean recall less two standard errors.
    seconds: CPU time of all queries.
  """

  leaves: int
  reorder: int
  recall: float
  sure: float
  seconds: float


def reach_recall(scann: ScannIndex, exact: ExactIndex, goal: RecallGoal) -> None:
  """Sets how many leaves ScaNN visits and how many candidates it reorders, so that it reaches a recall in least time.

  Recall and time rise with both numbers. For each of a few numbers of candidates, the fewest leaves that suffice are
  found by doubling and bisection, and the fastest of these settings is chosen. A setting suffices if the mean recall of
  the sample exceeds the one asked for by two standard errors, so that other queries probably reach it too. Time is CPU
  time, which other processes disturb little. If no setting suffices, the one of highest recall is set, with a warning.

  Args:
    scann: ScaNN over the labels, with reordering; its parameters are replaced.
    exact: Exact search of the same labels.
    goal: The recall and the queries to measure it on.
  """
  built, k = scann.parameters, min(max(RECALL_AT), scann.num_labels)
  recall, sample = goal
  _, exact_ids = exact.search(sample.queries, k)

  def attempt(leaves: int, reorder: int) -> _Trial:
    scann.parameters = dataclasses.replace(built, leaves_to_search=leaves, reorder=reorder)
    start = time.process_time()
    _, ids = scann.search(sample.queries, k)
    seconds = time.process_time() - start
    shares = [np.isin(wanted, found).mean() for wanted, found in zip(exact_ids, ids, strict=True)]
    mean = float(np.mean(shares))
    return _Trial(leaves, reorder, mean, mean - 2 * float(np.std(shares)) / math.sqrt(len(shares)), seconds)

  sufficient: list[_Trial] = []
  highest: _Trial | None = None
  for multiple in _REORDER:
    tried = _fewest_leaves(
      functools.partial(attempt, reorder=multiple * k),
      recall,
      # Fewer candidates need no fewer leaves.
      fewest=sufficient[-1].leaves if sufficient else math.ceil(built.leaves * _FIRST_SHARE),
      most=built.leaves,
      seconds=_SLOWER * min((trial.seconds for trial in sufficient), default=math.inf),
    )
    highest = highest or tried
    if tried.sure < recall:
      break  # Fewer candidates find even less.
    sufficient.append(tried)
  assert highest is not None
  chosen = min(sufficient, key=lambda trial: trial.seconds, default=highest)
  scann.parameters = dataclasses.replace(built, leaves_to_search=chosen.leaves, reorder=chosen.reorder)
  of_leaves = f"{chosen.leaves} of {built.leaves} leaves and " if built.leaves else ""
  _log.log(
    logging.INFO if sufficient else logging.WARNING,
    "ScaNN with %s%d candidates finds %.2f %% of the top %d of %d %s, %s",
    of_leaves,
    chosen.reorder,
    100 * chosen.recall,
    k,
    len(exact_ids),
    sample.of,
    f"for a recall of {100 * recall:g} %"
    if sufficient
    else f"the most of all settings; {100 * recall:g} % cannot be reached: use exact search or a lower recall",
  )


def _fewest_leaves(attempt: Callable[[int], _Trial], recall: float, fewest: int, most: int, seconds: float) -> _Trial:
  """Returns the trial of the fewest leaves that suffice, up to a sixteenth; else the last one, which does not.

  Args:
    attempt: Function that tries a number of leaves.
    recall: Recall to reach.
    fewest: Number of leaves to begin with.
    most: Number of all leaves.
    seconds: Time of a trial above which more leaves are not tried.
  """
  low, trial = fewest, attempt(fewest)
  while trial.sure < recall and trial.leaves < most and trial.seconds <= seconds:
    low = trial.leaves + 1
    trial = attempt(min(2 * trial.leaves, most))
  while trial.sure >= recall and trial.leaves - low > trial.leaves * _PRECISION:
    middle = attempt((low + trial.leaves) // 2)
    if middle.sure >= recall:
      trial = middle
    else:
      low = middle.leaves + 1
  return trial
