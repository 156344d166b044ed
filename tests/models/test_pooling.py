"""Pooling of segments: means and last tokens."""

import jax.numpy as jnp
import numpy as np

from vixml_jax.models.pooling import last_places, pool_segments


def test_pooling_is_the_mean_of_each_segment_and_zero_for_empty_slots():
  hidden = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
  segments = np.array([[1, 1, 3, 3, 3, 0], [2, 0, 0, 0, 0, 0]])
  pooled = pool_segments(jnp.asarray(hidden), jnp.asarray(segments), 3)
  assert pooled.shape == (2, 3, 4) and pooled.dtype == jnp.float32
  np.testing.assert_allclose(pooled[0, 0], hidden[0, :2].mean(0), rtol=1e-5)
  np.testing.assert_allclose(pooled[0, 2], hidden[0, 2:5].mean(0), rtol=1e-5)
  np.testing.assert_allclose(pooled[1, 1], hidden[1, 0], rtol=1e-5)
  for row, slot in [(0, 1), (1, 0), (1, 2)]:
    np.testing.assert_array_equal(pooled[row, slot], 0)


def test_bfloat16_is_summed_in_float32():
  hidden = jnp.full((1, 1000, 1), 1.0078125, jnp.bfloat16)  # A bfloat16 sum would stop growing at 256.
  pooled = pool_segments(hidden, jnp.ones((1, 1000), jnp.int32), 1)
  np.testing.assert_allclose(pooled, 1.0078125, rtol=1e-6)


def test_the_last_places_are_those_of_the_last_token_of_each_segment():
  segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 2, 0, 0, 0, 0]])
  assert last_places(segments).tolist() == [[0, 1, 0, 0, 2, 0], [1, 2, 0, 0, 0, 0]]
