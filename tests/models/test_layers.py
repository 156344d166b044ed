"""Norms and GELU against torch, and the statistics of dropout."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
import torch

from vixml_jax.models import layers


def _random(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_gelu_equals_the_exact_gelu_of_torch():
  x = np.linspace(-6, 6, 1001, dtype=np.float32)
  np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), torch.nn.functional.gelu(torch.tensor(x)), atol=2e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_layer_norm_equals_torch(offset):
  norm = layers.LayerNorm(16, 1e-5)
  norm.scale.set_value(jnp.asarray(_random(16, 1)))
  norm.bias.set_value(jnp.asarray(_random(16, 2)))
  x = _random((3, 16)) + np.float32(offset)
  wanted = torch.nn.functional.layer_norm(
    torch.tensor(x), (16,), torch.tensor(_random(16, 1)), torch.tensor(_random(16, 2)), 1e-5
  )
  np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, atol=2e-4)


def test_rms_norm_equals_torch():
  norm = layers.RMSNorm(16, 1e-5)
  rng = np.random.default_rng(0)
  scale, x = rng.normal(size=16).astype(np.float32), rng.normal(size=(3, 16)).astype(np.float32)
  norm.scale.set_value(jnp.asarray(scale))
  wanted = torch.nn.functional.rms_norm(torch.tensor(x), (16,), torch.tensor(scale), 1e-5)
  np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, atol=1e-6)
  assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(64, 1024), (33, 3, 7, 101)])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(implementation, shape):
  y = np.asarray(layers.dropout(jnp.ones(shape), 0.1, jax.random.key(0, impl=implementation)))
  kept = y > 0
  rate = 26 / 256
  assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / y.size)
  np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
  # Adjacent elements share a random word but must be independent, and so must rows.
  assert abs(np.corrcoef(kept[..., :-1].ravel(), kept[..., 1:].ravel())[0, 1]) < 0.03
  assert abs(np.corrcoef(kept[:-1].ravel(), kept[1:].ravel())[0, 1]) < 0.03


def test_dropout_without_key_or_rate_is_the_identity():
  x = jnp.asarray(_random((3, 5)))
  assert layers.dropout(x, 0.5, None) is x
  assert layers.dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0, 0.999, 0.001])
def test_an_impossible_dropout_rate_raises_an_error(rate):
  with pytest.raises(ValueError, match="dropout rate"):
    layers.dropout(jnp.ones((2, 4)), rate, jax.random.key(0))


def test_dropout_keeps_the_dtype():
  assert layers.dropout(jnp.ones((2, 6), jnp.bfloat16), 0.1, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", [("data", None), (None, "data")])
def test_dropout_is_the_same_on_one_device_and_on_eight(spec):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  x, key = jnp.ones((64, 96)), jax.random.key(3)
  drop = jax.jit(lambda x, key: layers.dropout(x, 0.3, key))
  np.testing.assert_array_equal(drop(x, key), drop(jax.device_put(x, sharding), key))
