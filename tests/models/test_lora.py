"""Rank-stabilized LoRA against peft: forward, gradients, merging, initial values."""

import copy

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from tests.helpers import tiny_decoders, tiny_encoders
from vixml_jax.models import layers
from vixml_jax.models.lora import lora_scale, merge_lora
from vixml_jax.models.parameters import merge_params, split_params
from vixml_jax.weights import engine, hf_config

RANK, ALPHA = 4, 6.0


@pytest.fixture(scope="module", params=["qwen2", "gemma3_text"])
def pair(request, tmp_path_factory):
  """Folder of the base, the model of peft with random adapters, structure and parameters of ours."""
  folder = tmp_path_factory.mktemp(request.param)
  base = tiny_decoders.hf_decoder(request.param)
  base.save_pretrained(folder)
  theirs = tiny_decoders.peft_decoder(base, RANK, ALPHA)
  adapters = _adapters({name: value.detach().numpy() for name, value in theirs.named_parameters()}, folder)
  return folder, theirs, *tiny_decoders.with_adapters(folder, adapters, lora_rank=RANK, lora_alpha=ALPHA)


def _adapters(tensors, folder):
  """Tensors of peft's adapters as our arrays: transposed, heads split, layers stacked."""
  _, shapes, _ = tiny_decoders.abstract(**hf_config.encoder_arguments(folder), lora_rank=RANK, lora_alpha=ALPHA)
  shapes = engine.flatten_tree(shapes)
  return {
    f"layers/{ours}/{part}": np.stack(
      [
        tensors[f"base_model.model.layers.{layer}.{name}.{their_part}.default.weight"].T
        for layer in range(tiny_decoders.LAYERS)
      ]
    ).reshape(shapes[f"layers/{ours}/{part}"].shape)
    for ours, name in tiny_decoders.PROJECTIONS.items()
    for part, their_part in (("lora_a", "lora_A"), ("lora_b", "lora_B"))
  }


def _packed():
  """Two texts packed by us and padded for them."""
  texts = tiny_encoders.texts([7, 12])
  return tiny_encoders.packed([texts], 19), *tiny_encoders.padded(texts)


def test_the_adapted_decoder_equals_that_of_peft(pair):
  _, theirs, graphdef, params = pair
  packed, tokens, mask = _packed()
  with torch.no_grad():
    wanted = tiny_decoders.run_theirs(theirs, tokens, mask).last_hidden_state.numpy()[mask > 0]
    with theirs.disable_adapter():
      plain = tiny_decoders.run_theirs(theirs, tokens, mask).last_hidden_state.numpy()[mask > 0]
  found = jax.jit(lambda p: merge_params(graphdef, p)(*packed))(params)[0]
  np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
  assert np.abs(wanted - plain).max() > 0.1


def test_gradients_of_adapters_equal_those_of_torch(pair):
  folder, theirs, graphdef, params = pair
  packed, tokens, mask = _packed()
  weights = np.random.default_rng(0).normal(size=(int(mask.sum()), tiny_decoders.DIM)).astype(np.float32)
  theirs.zero_grad()
  hidden = tiny_decoders.run_theirs(theirs, tokens, mask).last_hidden_state[torch.tensor(mask > 0)]
  (hidden * torch.tensor(weights)).sum().backward()
  wanted = _adapters({name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}, folder)

  flat = engine.flatten_tree(params)

  def loss(adapters, base):
    return (merge_params(graphdef, engine.unflatten_tree(base | adapters))(*packed)[0] * weights).sum()

  found = jax.jit(jax.grad(loss))({name: flat[name] for name in wanted}, flat)
  assert len(wanted) == 14
  for name, gradient in wanted.items():
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_the_merged_decoder_equals_that_of_peft_and_the_adapted_one(pair, tmp_path):
  _, theirs, graphdef, params = pair
  packed, *_ = _packed()
  adapted = jax.jit(lambda p: merge_params(graphdef, p)(*packed))(params)[0]
  merged = jax.jit(merge_lora, static_argnums=1)(params, lora_scale(RANK, ALPHA))
  copy.deepcopy(theirs).merge_and_unload().save_pretrained(tmp_path)
  plain_graphdef, wanted = tiny_decoders.our_decoder(tmp_path)
  assert engine.flatten_tree(merged).keys() == engine.flatten_tree(wanted).keys()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, wanted)
  found = jax.jit(lambda p: merge_params(plain_graphdef, p)(*packed))(merged)[0]
  np.testing.assert_allclose(found, adapted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
  "inputs, outputs", [({"embed": 6}, {"heads": 2, "head_dim": 5}), ({"heads": 2, "head_dim": 3}, {"embed": 7})]
)
def test_one_adapted_map_merges_into_its_kernel(inputs, outputs):
  linear = layers.Linear(inputs, outputs, lora_rank=3, lora_alpha=2.0, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  linear.lora_b.set_value(jnp.asarray(rng.normal(size=linear.lora_b.shape), jnp.float32))
  x = rng.normal(size=(4, *inputs.values())).astype(np.float32)
  params = split_params(linear)[1]
  merged = merge_lora(params, 2.0 / np.sqrt(3.0))
  assert merged.keys() == {"kernel", "bias"} and "lora_a" in params
  kernel = np.asarray(merged["kernel"]).reshape(6, -1)
  wanted = (x.reshape(4, 6) @ kernel).reshape(4, *outputs.values())
  np.testing.assert_allclose(linear(jnp.asarray(x)), wanted, atol=1e-5)
  base = layers.Linear(inputs, outputs, rngs=nnx.Rngs(0))
  assert np.abs(base(jnp.asarray(x)) - wanted).max() > 0.1


def test_a_new_adapter_changes_nothing_and_starts_as_in_peft():
  base = layers.Linear({"heads": 8, "head_dim": 32}, {"embed": 5}, rngs=nnx.Rngs(0))
  adapted = layers.Linear({"heads": 8, "head_dim": 32}, {"embed": 5}, lora_rank=64, lora_alpha=64.0, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 32)), jnp.float32)
  np.testing.assert_array_equal(base(x), adapted(x))
  theirs = (
    peft.tuners.lora.Linear(torch.nn.Linear(256, 5), "default", peft.LoraConfig(), r=64)
    .lora_A["default"]
    .weight.detach()
    .numpy()
  )
  a = np.asarray(adapted.lora_a[...])
  assert a.shape == (8, 32, 64) and not adapted.lora_b[...].any()
  for moment in (np.std, np.max, lambda v: -np.min(v)):
    np.testing.assert_allclose(moment(a), moment(theirs), rtol=0.02)
  np.testing.assert_allclose(np.abs(a).max(), 1 / 16, rtol=0.01)
  np.testing.assert_allclose(a.std(), 1 / 16 / np.sqrt(3), rtol=0.02)


def test_every_projection_has_an_adapter_of_its_own_in_every_layer(pair):
  folder, *_ = pair
  arguments = hf_config.encoder_arguments(folder)
  _, plain, plain_axes = tiny_decoders.abstract(**arguments)
  _, shapes, axes = tiny_decoders.abstract(**arguments, lora_rank=RANK, lora_alpha=ALPHA, param_dtype="bfloat16")
  added = engine.flatten_tree(shapes).keys() - engine.flatten_tree(plain).keys()
  assert added == {f"layers/{name}/{part}" for name in tiny_decoders.PROJECTIONS for part in ("lora_a", "lora_b")}
  assert {engine.flatten_tree(shapes)[name].dtype.name for name in added} == {"float32"}
  assert {shape.dtype.name for name, shape in engine.flatten_tree(shapes).items() if name not in added} == {"bfloat16"}
  assert axes["layers"]["attention"]["output"]["lora_a"] == ("layers", "heads", "head_dim", "lora_alone")
  assert axes["layers"]["attention"]["key"]["lora_b"] == ("layers", "lora_alone", "kv_heads", "head_dim")
  assert all(engine.flatten_tree(axes)[name] == value for name, value in engine.flatten_tree(plain_axes).items())


def test_a_bfloat16_base_with_float32_adapters_is_as_precise_as_that_of_peft(pair):
  folder, theirs, _, params = pair
  packed, tokens, mask = _packed()
  adapters = {name: value for name, value in engine.flatten_tree(params).items() if "/lora_" in name}
  graphdef, params = tiny_decoders.with_adapters(
    folder, adapters, lora_rank=RANK, lora_alpha=ALPHA, param_dtype="bfloat16", dtype="bfloat16"
  )
  found = jax.jit(lambda p: merge_params(graphdef, p)(*packed)[0])(params)
  assert found.dtype == jnp.bfloat16
  with torch.no_grad():
    exact, half = (
      tiny_decoders.run_theirs(model, tokens, mask).last_hidden_state.float().numpy()[mask > 0]
      for model in (theirs, copy.deepcopy(theirs).to(torch.bfloat16))
    )
  error, their_error = (np.sqrt(np.square(np.float32(x) - exact).mean()) for x in (found, half))
  assert 0 < error < 1.25 * their_error
  merged = merge_lora(params, lora_scale(RANK, ALPHA))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}


@pytest.mark.parametrize("rank, alpha", [(4, 0.0), (4, -1.0), (-1, 4.0)])
def test_an_adapter_without_rank_or_alpha_raises_an_error(rank, alpha):
  with pytest.raises(ValueError, match="both must be positive"):
    layers.Linear({"embed": 3}, {"mlp": 2}, lora_rank=rank, lora_alpha=alpha, rngs=nnx.Rngs(0))
