"""What the page offers before its user has typed anything: queries to try and categories to choose from."""

import numpy as np

from vixml_jax.search.label_index import LabelIndex

_QUERIES, _CATEGORIES, _MOST_CHARACTERS = 6, 200, 60


def example_queries(labels: LabelIndex) -> list[str]:
  """Returns short texts of the labels that most training queries have, or of some labels if the index has no queries.

  Args:
    labels: The label index.
  """
  live = np.flatnonzero(~labels.deleted)
  if labels.retrieval is None and labels.blend is None:
    order = live[np.unique(np.linspace(0, len(live) - 1, 4 * _QUERIES).astype(np.int64))]
  else:
    frequencies = np.bincount(labels.query_labels.values, minlength=labels.num_labels)
    order = live[np.argsort(-frequencies[live], kind="stable")[: 4 * _QUERIES]]
  texts = dict.fromkeys(text.strip() for text in labels.texts(order))
  return [text for text in texts if 0 < len(text) <= _MOST_CHARACTERS][:_QUERIES]


def first_categories(labels: LabelIndex) -> list[str]:
  """Returns the first 200 categories of an index, in their order."""
  return labels.categories[:_CATEGORIES]
