"""Inverse propensities equal napkinxc's, and are those of probabilities for any number of queries."""

import napkinxc.metrics
import numpy as np
import pytest

from vixml_jax.datasets.propensity import inverse_propensity


def test_inverse_propensity_equals_napkinxc():
  rng = np.random.default_rng(0)
  rows = [rng.choice(40, rng.integers(1, 5), replace=False).tolist() for _ in range(300)] + [[39]]
  frequencies = np.bincount(np.concatenate(rows), minlength=40)
  expected = napkinxc.metrics.Jain_et_al_inverse_propensity(rows, A=0.6, B=2.6)
  np.testing.assert_allclose(inverse_propensity(frequencies, len(rows), 0.6, 2.6), expected, rtol=1e-12)


@pytest.mark.parametrize("num_queries", [1, 2, 3, 10**7])
@pytest.mark.parametrize("constants", [(0.6, 2.6), (0.5, 0.4), (0.55, 1.5)])
def test_inverse_propensities_are_finite_at_least_1_and_fall_with_the_frequency(num_queries, constants):
  frequencies = np.unique([0, 1, min(2, num_queries), num_queries])
  found = inverse_propensity(frequencies, num_queries, *constants)
  assert np.isfinite(found).all() and (found >= 1).all() and (np.diff(found) <= 0).all()
