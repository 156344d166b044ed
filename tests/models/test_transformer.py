"""The post-norm layer against torch, and stacks of layers under scan against single layers."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.helpers.torch_layers import copy_torch_layer, torch_layer
from vixml_jax.models.parameters import merge_params, split_params
from vixml_jax.models.transformer import PostNormLayer, scan_layers, stack_layers


def _random(shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _make_layer(rngs):
  return PostNormLayer(16, 2, 24, rngs=rngs)


def _run_layer(segments):
  return lambda layer, x, key: layer(x, segments, key)


def test_the_post_norm_layer_equals_torch():
  theirs = torch_layer(32, 4, 64)
  ours = PostNormLayer(32, 4, 64, layer_norm_eps=1e-5, rngs=nnx.Rngs(0))
  copy_torch_layer(theirs, ours)
  x = _random((5, 3, 32))
  with torch.no_grad():
    wanted = theirs(torch.tensor(x))
  np.testing.assert_allclose(ours(jnp.asarray(x), None), wanted, atol=1e-5)


def test_scanned_layers_equal_the_layers_one_after_another():
  stack = stack_layers(_make_layer, 3, nnx.Rngs(0))
  graphdef, params, _ = split_params(stack)
  kernels = params["up"]["kernel"]
  assert not np.allclose(kernels[0], kernels[1])
  x, segments = jnp.asarray(_random((2, 5, 16))), jnp.ones((2, 5), jnp.int32)
  keys = jax.random.split(jax.random.key(0), 3)
  last, outputs = scan_layers(stack, x, _run_layer(segments), keys, return_layers=True)
  run = jax.jit(lambda p, x, key: merge_params(graphdef, p)(x, segments, key))
  for index in range(3):
    x = run(jax.tree.map(lambda p, i=index: p[i], params), x, keys[index])
    np.testing.assert_allclose(outputs[index], x, atol=1e-5)
  np.testing.assert_array_equal(last, outputs[-1])


def test_remat_changes_no_value_and_no_gradient():
  graphdef, params, _ = split_params(stack_layers(_make_layer, 3, nnx.Rngs(0)))
  x, keys = jnp.asarray(_random((2, 5, 16))), jax.random.split(jax.random.key(0), 3)

  def loss(params, remat):
    stack = merge_params(graphdef, params)
    y, _ = scan_layers(stack, x, _run_layer(None), keys, remat)
    return jnp.square(y[..., 0]).sum()

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  plain, remat = run(params, False), run(params, True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)
  assert "remat" in str(jax.make_jaxpr(lambda p: jax.grad(loss)(p, True))(params))
