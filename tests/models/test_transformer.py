"""The post-norm layer against torch, and stacks of layers under scan against single layers."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.helpers.torch_layers import copy_torch_layer, torch_layer
from vixml_jax.models.parameters import merge_params, split_params
from vixml_jax.models.transformer import SAVED_NAMES, PostNormLayer, scan_layers, stack_layers


def _random(shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _make_layer(rngs):
  return PostNormLayer(16, 2, 24, rngs=rngs)


def _run_layer(segments):
  return lambda layer, x, _, key, own: layer(x, segments, key)


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
  last, outputs = scan_layers(stack, x, _run_layer(segments), keys=keys, return_layers=True)
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
    y, _ = scan_layers(stack, x, _run_layer(None), keys=keys, remat=remat)
    return jnp.square(y[..., 0]).sum()

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  plain, remat = run(params, False), run(params, True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)
  assert "remat" in str(jax.make_jaxpr(lambda p: jax.grad(loss)(p, True))(params))


def _products(function, *args):
  """Returns the number of matrix products in the gradient of a function; a loop counts once."""
  return str(jax.make_jaxpr(jax.grad(function))(*args)).count("dot_general")


def test_saved_activations_are_not_recomputed():
  graphdef, params, _ = split_params(stack_layers(_make_layer, 3, nnx.Rngs(0)))
  x = jnp.asarray(_random((2, 5, 16)))

  def loss(params, remat, saved=()):
    stack = merge_params(graphdef, params)
    return scan_layers(stack, x, _run_layer(None), remat=remat, saved=saved)[0].sum()

  forward = 8  # Queries, keys, values, logits, their mean, output, up and down; each has two gradients.
  assert _products(lambda p: loss(p, False), params) == 3 * forward
  assert _products(lambda p: loss(p, True), params) == 4 * forward
  for names in (("up",), ("attention",), ("query", "key", "value"), ("query", "key", "value", "attention", "up")):
    assert _products(lambda p, names=names: loss(p, True, names), params) == 4 * forward - len(names), names
  values = [jax.jit(jax.grad(lambda p, names=names: loss(p, True, names)))(params) for names in ((), SAVED_NAMES)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *values)


def _chunked():
  """Returns structure and parameters of three layers, rows in three chunks, segments, and which chunks are filled."""
  graphdef, params, _ = split_params(stack_layers(_make_layer, 3, nnx.Rngs(0)))
  segments = np.ones((3, 2, 5), np.int32)
  segments[1] = 0
  return graphdef, params, jnp.asarray(_random((3, 2, 5, 16))), segments, (segments > 0).any((1, 2))


def _run_on(layer, x, segments, key, own):
  return layer(x, segments, key)


def test_chunks_within_layers_give_the_values_and_gradients_of_a_plain_loop_each_with_its_own_dropout():
  graphdef, params, x, segments, filled = _chunked()
  keys = jax.random.split(jax.random.key(0), 3)

  def ours(params, x):
    stack = merge_params(graphdef, params)
    y, _ = scan_layers(stack, x, _run_on, segments, keys, filled=jnp.asarray(filled))
    return jnp.square(y[..., 0]).sum(), y

  def loop(params, x):
    for index in range(3):
      layer = merge_params(graphdef, jax.tree.map(lambda p, i=index: p[i], params))
      chunk_keys = jax.random.split(keys[index], 3)
      chunks = enumerate(zip(x, jnp.asarray(segments), chunk_keys, strict=True))
      x = jnp.stack([layer(*chunk) if filled[number] else jnp.zeros_like(x[0]) for number, chunk in chunks])
    return jnp.square(x[..., 0]).sum(), x

  found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, x) for f in (ours, loop))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, wanted)


def test_chunks_within_layers_compute_each_product_twice_forward_and_keep_only_the_inputs_of_layers():
  graphdef, params, x, segments, filled = _chunked()

  def loss(params, *chunks):
    x, context, full = chunks
    return scan_layers(merge_params(graphdef, params), x, _run_on, context, filled=full)[0].sum()

  assert _products(loss, params, x, segments, filled) == 4 * 8

  def temporaries(repeated):
    chunks = (np.concatenate([array] * repeated) for array in (x, segments, filled))
    return jax.jit(jax.grad(loss)).lower(params, *chunks).compile().memory_analysis().temp_size_in_bytes

  # Of each further chunk: the inputs of three layers, and a few arrays of this size between them. The activations of a
  # layer are several times larger: queries, keys, values, the feed-forward network's 24 columns.
  grown = (temporaries(100) - temporaries(10)) / (90 * x.nbytes)
  assert grown < 9
