"""Bootstrap intervals: width, ratios of sums, seed."""

import numpy as np
import pytest

from tests.helpers.random_rankings import KS, random_rankings
from vixml_jax.datasets.propensity import inverse_propensity
from vixml_jax.evaluation import bootstrap
from vixml_jax.evaluation.bootstrap import bootstrap_intervals, resample
from vixml_jax.evaluation.metrics import evaluate, query_metrics
from vixml_jax.ragged import Ragged


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation():
  ids, truth, frequencies = random_rankings(num_queries=2000)
  values = query_metrics(ids, Ragged.from_rows(truth), inverse_propensity(frequencies, 1000, 0.55, 1.5), **KS)
  intervals = bootstrap_intervals(values, seed=1)
  for name in ("P@1", "nDCG@5", "R@20"):
    column = values.numerators[:, values.names.index(name)]
    half = 100 * 1.96 * column.std() / np.sqrt(len(column))
    low, high = intervals[name]
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (high + low) / 2 == pytest.approx(100 * column.mean(), abs=0.2 * half)


def test_psp_is_a_ratio_of_sums_in_every_sample():
  ids, truth, frequencies = random_rankings()
  values = query_metrics(ids, Ragged.from_rows(truth), inverse_propensity(frequencies, 1000, 0.55, 1.5), **KS)
  # A generator that repeats the draws: for a single block, these are its integers in order.
  rng = np.random.default_rng(3)
  rng.multinomial(200, [1.0], size=4)
  samples = resample(values, resamples=4, seed=3)
  for sample in samples:
    drawn = rng.integers(0, 200, 200, dtype=np.uint16)
    expected = evaluate(
      ids[drawn], Ragged.from_rows([truth[i] for i in drawn]), inverse_propensity(frequencies, 1000, 0.55, 1.5), **KS
    )
    np.testing.assert_allclose(sample, list(expected.values()), rtol=1e-5)


def test_intervals_are_determined_by_the_seed_and_blocks_keep_their_width(monkeypatch):
  ids, truth, frequencies = random_rankings(num_queries=1000)
  values = query_metrics(ids, Ragged.from_rows(truth), inverse_propensity(frequencies, 1000, 0.55, 1.5), **KS)
  one = bootstrap_intervals(values, seed=5)
  assert bootstrap_intervals(values, seed=5) == one
  assert bootstrap_intervals(values, seed=6) != one
  monkeypatch.setattr(bootstrap, "QUERIES_AT_ONCE", 64)
  blocks = bootstrap_intervals(values, seed=5)
  for name in ("P@1", "PSP@5", "PSnDCG@3", "R@20"):
    assert blocks[name][1] - blocks[name][0] == pytest.approx(one[name][1] - one[name][0], rel=0.15)
