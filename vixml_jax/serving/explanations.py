"""Why a label was found: similar training queries that have it, and words that it shares with the query."""

from collections.abc import Mapping, Sequence
import enum
import re
from typing import Any

import numpy as np

from vixml_jax.blend.lexical import count_ngrams
from vixml_jax.inference.predictions import Prediction
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.text_table import TextTable

_WORD = re.compile(r"\b\w\w+\b")  # As scikit-learn splits texts by default; the blend counts these.
_MOST_NEIGHBORS, _MOST_LABELS = 3, 5


class Detail(enum.StrEnum):
  """What a server says of the training queries that explain a label."""

  TEXTS = "texts"
  ROWS = "rows"
  NONE = "none"


Why = dict[str, Any]
"""JSON of a `schema.Why`."""


def explain(
  index: LabelIndex,
  hits: int,
  texts: Sequence[str],
  embeddings: np.ndarray,
  found: Sequence[Sequence[Prediction]],
  show_texts: bool = True,
) -> list[list[Why]]:
  """Returns an explanation of each label of each query.

  Args:
    index: Index with training queries.
    hits: Number of training queries to look up for each query.
    texts: Texts of the Q queries.
    embeddings: Their embeddings, float32 [Q, D].
    found: Their labels.
    show_texts: Whether to return the texts of training queries, if the index has them.
  """
  table = index.query_texts if show_texts else None
  scores, ids = index.query_index.search(embeddings, hits)
  return [
    _explain_query(index, table, text, own_scores, own_ids, labels)
    for text, own_scores, own_ids, labels in zip(texts, scores, ids, found, strict=True)
  ]


def _explain_query(
  index: LabelIndex,
  table: TextTable | None,
  text: str,
  scores: np.ndarray,
  ids: np.ndarray,
  labels: Sequence[Prediction],
) -> list[Why]:
  scores, ids = scores[ids >= 0], ids[ids >= 0]
  labels_of = index.query_labels.take(ids)
  queries_with = labels_of.row_ids()
  words = _words(text)
  columns = _columns(index, words)
  described: dict[int, dict[str, Any]] = {}
  explanations = []
  for label in labels:
    places = queries_with[labels_of.values == label.id][:_MOST_NEIGHBORS].tolist()
    for place in places:
      if place not in described:
        row = int(ids[place])
        shown = None if table is None else table.take([row])[0]
        described[place] = {
          "row": row,
          "text": shown,
          "score": float(scores[place]),
          "words": _shared_with_query(index, row, columns) if columns else _shared(words, shown or ""),
          "labels": _describe_labels(index, labels_of[place][:_MOST_LABELS]),
        }
    explanations.append({"words": _shared(words, label.text), "neighbors": [described[place] for place in places]})
  return explanations


def _describe_labels(index: LabelIndex, ids: np.ndarray) -> list[dict[str, Any]]:
  """Returns the JSON of a `schema.Label` for each label."""
  return [
    {"label": uid, "id": label, "text": text}
    for uid, label, text in zip(index.uids(ids), ids.tolist(), index.texts(ids), strict=True)
  ]


def _columns(index: LabelIndex, words: Sequence[str]) -> dict[int, str]:
  """Returns each word by its column of the blend's vectors; nothing if the index has no blend."""
  if index.blend is None or not words:
    return {}
  counts = count_ngrams([words], index.blend.words.queries.shape[1])  # One word a row, so one column.
  return dict(zip(counts.indices.tolist(), words, strict=True))


def _shared_with_query(index: LabelIndex, row: int, columns: Mapping[int, str]) -> list[str]:
  """Returns which words a training query has: the blend has those of its whole text, as columns."""
  assert index.blend is not None
  vectors = index.blend.words.queries
  own = set(vectors.indices[vectors.indptr[row] : vectors.indptr[row + 1]].tolist())
  return [word for column, word in columns.items() if column in own]


def _shared(words: Sequence[str], text: str) -> list[str]:
  """Returns which words a text has."""
  own = set(_words(text))
  return [word for word in words if word in own]


def _words(text: str) -> list[str]:
  """Returns the distinct words of a text in lower case, in their order."""
  return list(dict.fromkeys(_WORD.findall(text.lower())))
