"""Inverse propensities of labels: how much more a rare label counts than a frequent one."""

import numpy as np


def inverse_propensity(frequencies: np.ndarray, num_queries: int, a: float, b: float) -> np.ndarray:
  """Returns the inverse propensity of every label: 1 + (log N - 1) (B + 1)^A (frequency + B)^-A.

  The published numbers use A = 0.6, B = 2.6 for the Amazon sets, 0.5, 0.4 for the Wikipedia sets, and 0.55, 1.5 for
  all others.

  >>> inverse_propensity(np.array([0, 10, 1000]), num_queries=5000, a=0.6, b=2.6).round(2)
  array([10.14,  4.54,  1.26])

  Args:
    frequencies: Number of training queries of each label, [L].
    num_queries: N, the number of training queries, with or without labels.
    a: A.
    b: B.

  Returns:
    float64 [L].

  No value is below 1, since propensities are probabilities. With one or two queries, the formula gives less.

  Reference: Jain et al., Extreme Multi-label Loss Functions, KDD 2016.
  """
  scale = (np.log(num_queries) - 1) * (b + 1) ** a
  return 1 + np.maximum(scale, 0) * (np.asarray(frequencies, np.float64) + b) ** -a
