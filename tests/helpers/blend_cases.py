"""Random searches of the blend, and what they say about each label by loops over labels."""

import numpy as np

from vixml_jax.ragged import Ragged
from vixml_jax.search.retrieval_augmented import Neighbors

NUM_LABELS, NUM_TRAIN, NUM_QUERIES = 30, 20, 6


def random_labels(rng: np.random.Generator, rows: int, most: int) -> Ragged:
  """Distinct labels of each row, up to `most`; some rows have none."""
  return Ragged.from_rows(
    [np.sort(rng.choice(NUM_LABELS, rng.integers(0, most + 1), replace=False)) for _ in range(rows)]
  )


def random_neighbors(rng: np.random.Generator, labels: int = 5, queries: int = 4, empty: int = 1) -> Neighbors:
  """Labels and training queries of random scores; the last `empty` places of the first query are empty."""
  parts = []
  for count, width in ((NUM_LABELS, labels), (NUM_TRAIN, queries)):
    ids = np.stack([rng.permutation(count)[:width] for _ in range(NUM_QUERIES)]).astype(np.int32)
    scores = -np.sort(-rng.uniform(0.1, 0.9, ids.shape), axis=1).astype(np.float32)
    if empty:
      ids[0, -empty:], scores[0, -empty:] = -1, -np.inf
    parts += [scores, ids]
  return Neighbors(*parts)


def votes_by_loops(found: Neighbors, weights: np.ndarray, labels_of_queries: Ragged) -> list[dict[int, list[float]]]:
  """Vote and similarity of the best voter of each label, for each query."""
  votes = []
  for query in range(len(found.query_ids)):
    table: dict[int, list[float]] = {}
    for place, neighbor in enumerate(found.query_ids[query].tolist()):
      for label in labels_of_queries[neighbor].tolist() if neighbor >= 0 else ():
        old = table.get(label, [0.0, -np.inf])
        table[label] = [old[0] + weights[query, place], max(old[1], float(found.query_scores[query, place]))]
    votes.append(table)
  return votes


def softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
  """Softmax of each row."""
  mass = np.exp((scores - scores.max(axis=1, keepdims=True)) / temperature)
  return mass / mass.sum(axis=1, keepdims=True)
