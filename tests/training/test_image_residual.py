"""The initial residual map of images: lengths, angles, fewer dimensions than features."""

import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax.images.features import ImageFeatures
from vixml_jax.training.image_residual import start_residual, whitened_map


def features(count=400, dim=6, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, dim)) * (1 + np.arange(dim)) @ rng.normal(size=(dim, dim)) + 3


def cosines(x):
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  return x @ x.T


def test_the_map_keeps_the_angles_of_partly_whitened_features_and_gives_unit_length():
  x = features()
  kernel, bias = whitened_map(x, 16, seed=0)
  mapped = x @ kernel + bias
  assert np.isclose(np.square(mapped).sum(1).mean(), 1)
  np.testing.assert_allclose(mapped.mean(0), 0, atol=1e-12)
  # Partly whitened: multiplied by the covariance to the power of -1/4, here by a singular value decomposition.
  centered = x - x.mean(0)
  u, s, v = np.linalg.svd(centered / np.sqrt(len(x)), full_matrices=False)
  np.testing.assert_allclose(cosines(mapped), cosines(u * s**0.5 @ v), atol=1e-9)


def test_with_more_features_than_dimensions_the_directions_of_greatest_variance_are_kept():
  x = features(dim=6)
  mapped = np.add(*(lambda kernel, bias: (x @ kernel, bias))(*whitened_map(x, 3, seed=1)))
  u, s, _ = np.linalg.svd((x - x.mean(0)) / np.sqrt(len(x)), full_matrices=False)
  np.testing.assert_allclose(cosines(mapped), cosines((u * s**0.5)[:, :3]), atol=1e-9)


def test_a_constant_feature_gives_finite_values():
  x = features()
  x[:, 2] = 7
  kernel, bias = whitened_map(x, 16, seed=0)
  assert np.isfinite(kernel).all() and np.isclose(np.square(x @ kernel + bias).sum(1).mean(), 1)


@pytest.mark.parametrize("norm", [0.5, 2.0])
def test_added_vectors_have_the_requested_length(norm):
  values = features().astype(np.float16)
  on_host = ImageFeatures(values)
  fusion = {"project": {"kernel": jnp.ones((6, 16))}, "residual": {"kernel": jnp.ones((6, 16)), "bias": jnp.zeros(16)}}
  started = start_residual(fusion, on_host, norm, seed=0)
  assert started["project"] is fusion["project"]
  residual = started["residual"]
  added = (values.astype(np.float32) @ np.asarray(residual["kernel"]) + np.asarray(residual["bias"])) / np.sqrt(6)
  np.testing.assert_allclose(np.sqrt(np.square(added).sum(1).mean()), norm, rtol=1e-3)
