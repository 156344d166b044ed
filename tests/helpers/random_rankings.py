"""Random rankings with known labels for tests of metrics."""

import numpy as np

NUM_LABELS = 60
KS = dict(precision_ks=(1, 3, 5), recall_ks=(10, 20))


def random_rankings(num_queries=200, seed=0, hit_rate=0.5):
  """Returns rankings int32 [Q, 20], the positives of each query, and the frequency of each label.

  Every ninth query has no positives, and every seventh has fewer than 20 predictions.
  """
  rng = np.random.default_rng(seed)
  truth, ids = [], np.full((num_queries, 20), -1, np.int32)
  for query in range(num_queries):
    positives = rng.choice(NUM_LABELS, rng.integers(1, 30), replace=False)
    truth.append([] if query % 9 == 0 else positives.tolist())
    found = rng.permutation(NUM_LABELS)
    found = found[np.argsort(~np.isin(found, positives) * (rng.random(NUM_LABELS) < hit_rate), kind="stable")]
    length = rng.integers(0, 20) if query % 7 == 0 else 20
    ids[query, :length] = found[:length]
  frequencies = np.sort(rng.zipf(1.5, NUM_LABELS).clip(0, 300))[::-1].copy()
  frequencies[-5:] = 0
  return ids, truth, frequencies
