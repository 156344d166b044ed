"""Confidence intervals of the metrics by resampling queries."""

import numpy as np

from vixml_jax.evaluation.metrics import QueryMetrics

_QUERIES_AT_ONCE = 16_384


def resample(metrics: QueryMetrics, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
  """The metrics of `resamples` samples of Q queries drawn with replacement.

  The draws depend on the seed and on Q only, so results of two systems on the same queries
  are paired: subtract them for a paired bootstrap.

  A sample is drawn block by block (first how many of its draws fall into each block, then
  which), which is the same distribution and needs memory for `resamples` x 16,384 weights
  whatever Q is. Ratios of sums are formed anew in every sample.

  Args:
    metrics: of Q queries.
    resamples: S, how many samples.
    seed: seed of the draws.

  Returns:
    float64 [S, M], in percent, columns as in `metrics.names`.
  """
  rng = np.random.default_rng(seed)
  num_queries = len(metrics)
  starts = np.arange(0, num_queries, _QUERIES_AT_ONCE)
  sizes = np.minimum(starts + _QUERIES_AT_ONCE, num_queries) - starts
  draws = rng.multinomial(num_queries, sizes / max(num_queries, 1), size=resamples)
  numerators = np.zeros((resamples, metrics.numerators.shape[1]))
  denominators = np.zeros((resamples, metrics.denominators.shape[1]))
  for start, size, block_draws in zip(starts, sizes, draws.T, strict=True):
    counts = np.stack([_counts(rng, size, number) for number in block_draws])
    numerators += counts @ metrics.numerators[start : start + size]
    denominators += counts @ metrics.denominators[start : start + size]
  return metrics.totals(numerators, denominators, num_queries)


def bootstrap_intervals(
  metrics: QueryMetrics, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
  """Percentile intervals of every metric over queries.

  They say how much the numbers would move with other test queries; they say nothing about the
  spread over training seeds.

  Args:
    metrics: of Q queries.
    resamples: how many samples.
    seed: seed of the draws; the same seed gives the same intervals.
    level: share of the samples inside the interval.

  Returns:
    for every metric (low, high) in percent.
  """
  samples = resample(metrics, resamples=resamples, seed=seed)
  low, high = np.percentile(samples, [50 * (1 - level), 50 * (1 + level)], axis=0)
  return dict(zip(metrics.names, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def _counts(rng: np.random.Generator, size: int, draws: int) -> np.ndarray:
  """How often each of `size` queries is drawn."""
  chosen = rng.integers(0, size, draws, dtype=np.uint16)  # 16 bits: four times fewer random bits
  return np.bincount(chosen, minlength=size).astype(np.float32)
