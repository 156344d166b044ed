"""Describes each candidate of the blend by thirteen numbers, or sixteen where labels have classifiers."""

import numpy as np

from vixml_jax.blend.candidates import Sources, keys_of
from vixml_jax.ragged import Ragged, ranges

FEATURES = (
  "prototype_score",
  "prototype_rank",
  "prototype_gap",
  "vote_sharp",
  "vote_smooth",
  "best_voter",
  "lexical_score",
  "lexical_vote",
  "best_lexical_voter",
  "frequency_class",
  "best_prototype_score",
  "nearest_query",
  "num_candidates",
)
"""Names of the features, in the order of the columns."""
CLASSIFIER_FEATURES = ("classifier_score", "classifier_rank", "classifier_gap")
"""Names of three more features, where labels have classifiers."""


def candidate_features(sources: Sources, candidates: Ragged, frequencies: np.ndarray) -> np.ndarray:
  """Returns the features of each candidate, float32 [P, 13]; NaN where a source has not found the label.

  The first nine describe the label for the query: its score and rank (from 0) by prototype and the gap to the best
  label; the votes of the nearest training queries that have it at two temperatures, and the similarity of the best of
  these; the same three by words (score of the label's name, vote, best voter). A vote is 0 where no neighbor has the
  label. The tenth is ln(1 + number of training queries of the label) in steps of a half: the exact number would tell
  which label it is, and trees would learn labels by heart. The others describe the query.

  Args:
    sources: What is known about the labels of Q queries.
    candidates: Candidates, Q rows with P labels in total.
    frequencies: Number of training queries of each label, [L].
  """
  keys, queries = keys_of(candidates, sources.num_labels), candidates.row_ids()
  prototype = sources.labels.look_up(keys, np.nan)
  votes = sources.votes.look_up(keys, np.nan)
  lexical_votes = sources.lexical_votes.look_up(keys, np.nan)
  columns = [
    prototype[:, 0],
    prototype[:, 1],
    sources.best_label[queries] - prototype[:, 0],
    np.nan_to_num(votes[:, 0]),
    np.nan_to_num(votes[:, 1]),
    votes[:, 2],
    sources.lexical_labels.look_up(keys, 0)[:, 0],
    np.nan_to_num(lexical_votes[:, 0]),
    lexical_votes[:, 1],
    np.round(2 * np.log1p(frequencies[candidates.values])) / 2,
    sources.best_label[queries],
    sources.best_query[queries],
    candidates.lengths[queries],
  ]
  return np.stack(columns, axis=1).astype(np.float32)


def classifier_features(scores: np.ndarray, candidates: Ragged) -> np.ndarray:
  """Returns the features of each candidate by its classifier, float32 [P, 3]; NaN for a label without one.

  They are the score, its rank (from 0) among the candidates of the query, and the gap to the best of these.

  Args:
    scores: Score of each candidate by its classifier, float32 [P]; NaN for a label without one.
    candidates: Candidates, Q rows with P labels in total.
  """
  queries = candidates.row_ids()
  order = np.lexsort((-scores, queries))  # NaN is last.
  ranks = np.empty(len(scores), np.float32)
  ranks[order] = ranges(0, candidates.lengths)
  ranks[np.isnan(scores)] = np.nan
  best = np.full(len(candidates), -np.inf, np.float32)
  np.fmax.at(best, queries, scores)
  return np.stack([scores, ranks, best[queries] - scores], axis=1)
