"""Layers against torch and numpy; dropout's statistics; modules taken apart and put together."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
import torch

from vixml_jax.models import layers


def _random(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_attention_is_torch_attention_of_each_segment_alone():
  q, k, v = (_random((2, 9, 4, 8), seed) for seed in range(3))
  segments = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 2, 2, 0, 0, 0]])
  ours = layers.segment_attention(*map(jnp.asarray, (q, k, v, segments)))
  for row, slot in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
    members = segments[row] == slot
    wanted = torch.nn.functional.scaled_dot_product_attention(
      *(torch.tensor(x[row, members]).transpose(0, 1) for x in (q, k, v))
    ).transpose(0, 1)
    np.testing.assert_allclose(ours[row, members], wanted, atol=1e-6)
  assert np.isfinite(ours).all()


def test_attention_without_segments_sees_the_whole_row():
  q, k, v = (jnp.asarray(_random((2, 5, 4, 8), seed)) for seed in range(3))
  np.testing.assert_array_equal(
    layers.segment_attention(q, k, v, None), layers.segment_attention(q, k, v, jnp.ones((2, 5), jnp.int32))
  )


def test_pooling_is_the_mean_of_each_segment_and_zero_for_empty_slots():
  hidden = _random((2, 6, 4))
  segments = np.array([[1, 1, 3, 3, 3, 0], [2, 0, 0, 0, 0, 0]])
  pooled = layers.pool_segments(jnp.asarray(hidden), jnp.asarray(segments), 3)
  assert pooled.shape == (2, 3, 4) and pooled.dtype == jnp.float32
  np.testing.assert_allclose(pooled[0, 0], hidden[0, :2].mean(0), rtol=1e-5)
  np.testing.assert_allclose(pooled[0, 2], hidden[0, 2:5].mean(0), rtol=1e-5)
  np.testing.assert_allclose(pooled[1, 1], hidden[1, 0], rtol=1e-5)
  for row, slot in [(0, 1), (1, 0), (1, 2)]:
    np.testing.assert_array_equal(pooled[row, slot], 0)


def test_pooling_of_bf16_is_summed_in_f32():
  hidden = jnp.full((1, 1000, 1), 1.0078125, jnp.bfloat16)  # A bf16 sum would stall at 256.
  pooled = layers.pool_segments(hidden, jnp.ones((1, 1000), jnp.int32), 1)
  np.testing.assert_allclose(pooled, 1.0078125, rtol=1e-6)


def test_gelu_is_torch_exact_gelu():
  x = np.linspace(-6, 6, 1001, dtype=np.float32)
  np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), torch.nn.functional.gelu(torch.tensor(x)), atol=2e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_layer_norm_is_torch_layer_norm(offset):
  norm = layers.LayerNorm(16, 1e-5)
  norm.scale.set_value(jnp.asarray(_random(16, 1)))
  norm.bias.set_value(jnp.asarray(_random(16, 2)))
  x = _random((3, 16)) + np.float32(offset)
  wanted = torch.nn.functional.layer_norm(
    torch.tensor(x), (16,), torch.tensor(_random(16, 1)), torch.tensor(_random(16, 2)), 1e-5
  )
  np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, atol=2e-4)


def test_post_norm_layer_is_the_encoder_layer_of_torch():
  theirs = torch.nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=False).eval()
  ours = layers.PostNormLayer(32, 4, 64, layer_norm_eps=1e-5, rngs=nnx.Rngs(0))
  weights = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
  split = zip(("query", "key", "value"), np.split(weights["self_attn.in_proj_weight"], 3), strict=True)
  for name, kernel in split:
    getattr(ours.attention, name).kernel.set_value(jnp.asarray(kernel.T.reshape(32, 4, 8)))
  out = weights["self_attn.out_proj.weight"]
  ours.attention.output.kernel.set_value(jnp.asarray(out.T.reshape(4, 8, 32)))
  ours.up.kernel.set_value(jnp.asarray(weights["linear1.weight"].T))
  ours.up.bias.set_value(jnp.asarray(weights["linear1.bias"]))
  ours.down.kernel.set_value(jnp.asarray(weights["linear2.weight"].T))
  ours.down.bias.set_value(jnp.asarray(weights["linear2.bias"]))
  x = _random((5, 3, 32))
  with torch.no_grad():
    wanted = theirs(torch.tensor(x))
  np.testing.assert_allclose(ours(jnp.asarray(x), None), wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(64, 1024), (33, 3, 7, 101)])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(implementation, shape):
  y = np.asarray(layers.dropout(jnp.ones(shape), 0.1, jax.random.key(0, impl=implementation)))
  kept = y > 0
  rate = 26 / 256
  assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / y.size)
  np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
  # Neighbors share a random word, yet have to be independent: so have rows.
  assert abs(np.corrcoef(kept[..., :-1].ravel(), kept[..., 1:].ravel())[0, 1]) < 0.03
  assert abs(np.corrcoef(kept[:-1].ravel(), kept[1:].ravel())[0, 1]) < 0.03


def test_dropout_without_key_or_rate_is_the_identity():
  x = jnp.asarray(_random((3, 5)))
  assert layers.dropout(x, 0.5, None) is x
  assert layers.dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0, 0.999, 0.001])
def test_dropout_refuses_rates_that_it_cannot_do(rate):
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


def _make_layer(rngs):
  return layers.PostNormLayer(16, 2, 24, rngs=rngs)


def _run_layer(segments):
  return lambda layer, x, key: layer(x, segments, key)


def test_modules_come_apart_into_dicts_and_together_under_jit():
  stack = layers.stack_layers(_make_layer, 3, nnx.Rngs(0))
  graphdef, params, axes = layers.split_params(stack)
  assert params["up"]["kernel"].shape == (3, 16, 24)
  assert axes["up"]["kernel"] == ("layers", "embed", "mlp")
  assert axes["attention"]["query"]["kernel"] == ("layers", "embed", "heads", "head_dim")
  assert axes["attention"]["output"]["kernel"] == ("layers", "heads", "head_dim", "embed")
  assert jax.tree.map(lambda value, names: value.ndim == len(names), params, axes)
  double = jax.jit(lambda p: layers.split_params(layers.merge_params(graphdef, p))[1])(params)
  jax.tree.map(np.testing.assert_array_equal, double, params)


def test_abstract_modules_come_apart_like_real_ones():
  def make():
    return layers.stack_layers(_make_layer, 3, nnx.Rngs(0))

  graphdef, params, axes = layers.split_params(make())
  abstract_graphdef, shapes, abstract_axes = layers.split_params(nnx.eval_shape(make))
  assert abstract_axes == axes and abstract_graphdef == graphdef
  assert hash(abstract_graphdef) == hash(graphdef)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
  assert isinstance(layers.merge_params(abstract_graphdef, shapes).up.kernel, nnx.Param)


@pytest.mark.parametrize("metadata", [{}, {"axes": ("embed",)}])
def test_a_parameter_without_an_axis_for_each_dimension_is_refused(metadata):
  class Bare(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(jnp.zeros((2, 3)), **metadata)

  with pytest.raises(ValueError, match="kernel has shape"):
    layers.split_params(Bare())


def test_scanned_layers_are_the_layers_one_after_the_other():
  stack = layers.stack_layers(_make_layer, 3, nnx.Rngs(0))
  graphdef, params, _ = layers.split_params(stack)
  kernels = params["up"]["kernel"]
  assert not np.allclose(kernels[0], kernels[1])
  x, segments = jnp.asarray(_random((2, 5, 16))), jnp.ones((2, 5), jnp.int32)
  keys = jax.random.split(jax.random.key(0), 3)
  last, outputs = layers.scan_layers(stack, x, _run_layer(segments), keys, return_layers=True)
  run = jax.jit(lambda p, x, key: layers.merge_params(graphdef, p)(x, segments, key))
  for index in range(3):
    x = run(jax.tree.map(lambda p, i=index: p[i], params), x, keys[index])
    np.testing.assert_allclose(outputs[index], x, atol=1e-5)
  np.testing.assert_array_equal(last, outputs[-1])


def test_remat_changes_no_value_and_no_gradient():
  graphdef, params, _ = layers.split_params(layers.stack_layers(_make_layer, 3, nnx.Rngs(0)))
  x, keys = jnp.asarray(_random((2, 5, 16))), jax.random.split(jax.random.key(0), 3)

  def loss(params, remat):
    stack = layers.merge_params(graphdef, params)
    y, _ = layers.scan_layers(stack, x, _run_layer(None), keys, remat)
    return jnp.square(y[..., 0]).sum()

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  plain, remat = run(params, False), run(params, True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)
  assert "remat" in str(jax.make_jaxpr(lambda p: jax.grad(loss)(p, True))(params))
