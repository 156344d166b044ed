"""Inverse propensities equal napkinxc's."""

import napkinxc.metrics
import numpy as np

from vixml_jax.datasets.propensity import inverse_propensity


def test_inverse_propensity_equals_napkinxc():
  rng = np.random.default_rng(0)
  rows = [rng.choice(40, rng.integers(1, 5), replace=False).tolist() for _ in range(300)] + [[39]]
  frequencies = np.bincount(np.concatenate(rows), minlength=40)
  expected = napkinxc.metrics.Jain_et_al_inverse_propensity(rows, A=0.6, B=2.6)
  np.testing.assert_allclose(inverse_propensity(frequencies, len(rows), 0.6, 2.6), expected, rtol=1e-12)
