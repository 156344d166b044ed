"""Bootstrap confidence intervals of metrics: queries are resampled with replacement."""

import numpy as np

from vixml_jax.evaluation.metrics import QUERIES_AT_ONCE, QueryMetrics


def resample(metrics: QueryMetrics, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
  """Returns the metrics of bootstrap samples, each of which has Q queries drawn with replacement.

  The draws depend only on the seed and on Q. The samples of two systems on the same queries are therefore paired, and
  their differences are the samples of a paired bootstrap.

  Each sample is drawn in blocks: first how many of its draws fall into each block, then which queries of the block.
  This gives the same distribution, and memory is limited to `resamples` x 16,384 weights for any Q. Ratios of sums are
  computed from the sums of each sample.

  Args:
    metrics: Metrics of Q queries.
    resamples: Number of samples S.
    seed: Seed of the draws.

  Returns:
    The metrics in percent, float64 [S, M], columns as in `metrics.names`.
  """
  rng = np.random.default_rng(seed)
  num_queries = len(metrics)
  starts = np.arange(0, num_queries, QUERIES_AT_ONCE)
  sizes = np.minimum(starts + QUERIES_AT_ONCE, num_queries) - starts
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
  """Returns a percentile interval of each metric.

  The intervals estimate how much the metrics vary with the choice of test queries. They do not include the variation
  over training seeds.

  Args:
    metrics: Metrics of Q queries.
    resamples: Number of samples.
    seed: Seed of the draws; the same seed gives the same intervals.
    level: Fraction of the samples within an interval.

  Returns:
    The bounds (low, high) of each metric by name, in percent.
  """
  samples = resample(metrics, resamples=resamples, seed=seed)
  low, high = np.percentile(samples, [50 * (1 - level), 50 * (1 + level)], axis=0)
  return dict(zip(metrics.names, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def _counts(rng: np.random.Generator, size: int, draws: int) -> np.ndarray:
  """Returns how often each of `size` queries is drawn in a number of draws, float32 [size]."""
  chosen = rng.integers(0, size, draws, dtype=np.uint16)  # 16 bits are enough, and need a quarter of the random bits.
  return np.bincount(chosen, minlength=size).astype(np.float32)
