"""Decoders against transformers: hidden states, packing, gradients, rotary frequencies, sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.helpers import tiny_decoders, tiny_encoders
from vixml_jax.models import rotary_attention
from vixml_jax.models.parameters import merge_params
from vixml_jax.weights import engine, hf_config, tables


@pytest.fixture(scope="module", params=tiny_decoders.KINDS)
def pair(request, tmp_path_factory):
  """Kind, folder, model of transformers, structure and parameters of ours."""
  folder = tmp_path_factory.mktemp(request.param)
  theirs = tiny_decoders.hf_decoder(request.param)
  theirs.save_pretrained(folder)
  return request.param, folder, theirs, *tiny_decoders.our_decoder(folder)


def _run(graphdef):
  return jax.jit(lambda params, *x: merge_params(graphdef, params)(*x))


def test_every_layer_equals_that_of_transformers(pair):
  _, _, theirs, graphdef, params = pair
  tokens, mask = tiny_encoders.padded(tiny_encoders.texts([40, 40]))
  with torch.no_grad():
    wanted = tiny_decoders.run_theirs(theirs, tokens, mask, output_hidden_states=True)

  @jax.jit
  def run(params):
    ours = merge_params(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(40), tokens.shape)
    hidden = ours.encode_layers(ours.embed_tokens(jnp.asarray(tokens)), jnp.asarray(mask), positions)
    return hidden, ours.final_norm(hidden[-1])

  found, last = run(params)
  assert len(found) == len(wanted.hidden_states) == tiny_decoders.LAYERS + 1
  # transformers applies the final norm to the last one.
  for ours_layer, their_layer in zip([*found[:-1], last], wanted.hidden_states, strict=True):
    np.testing.assert_allclose(ours_layer, their_layer, atol=1e-4, rtol=0)


def test_packed_texts_equal_texts_padded_on_either_side(pair):
  _, _, theirs, graphdef, params = pair
  rows = [tiny_encoders.texts([5, 9, 3], 1), tiny_encoders.texts([17, 2], 2), tiny_encoders.texts([1], 3)]
  packed = tiny_encoders.packed(rows, 20)
  hidden = _run(graphdef)(params, *packed)
  assert np.isfinite(hidden).all()
  found = np.concatenate(
    [hidden[row][packed[1][row] == slot] for row in range(3) for slot in range(1, len(rows[row]) + 1)]
  )
  tokens, mask = tiny_encoders.padded([text for row in rows for text in row])
  shifts = -mask.sum(1)
  for padded_tokens, padded_mask in ((tokens, mask), [_rolled(x, shifts) for x in (tokens, mask)]):
    with torch.no_grad():
      wanted = tiny_decoders.run_theirs(theirs, padded_tokens, padded_mask).last_hidden_state.numpy()
    np.testing.assert_allclose(found, wanted[padded_mask > 0], atol=1e-4, rtol=0)


def _rolled(rows, shifts):
  return np.stack([np.roll(row, shift) for row, shift in zip(rows, shifts, strict=True)])


def test_bidirectional_attention_equals_transformers_with_a_full_mask(pair):
  _, folder, theirs, causal, params = pair
  lengths = [7, 9]  # Within the window of Gemma's local layers.
  texts = tiny_encoders.texts(lengths)
  with torch.no_grad():
    wanted = np.concatenate(
      [
        theirs(
          torch.tensor(text[None]), attention_mask=torch.zeros(1, 1, len(text), len(text)), use_cache=False
        ).last_hidden_state[0]
        for text in texts
      ]
    )
  graphdef = tiny_decoders.abstract(**hf_config.encoder_arguments(folder), bidirectional=True)[0]
  packed = tiny_encoders.packed([texts], sum(lengths))
  np.testing.assert_allclose(_run(graphdef)(params, *packed)[0], wanted, atol=1e-4, rtol=0)
  assert np.abs(_run(causal)(params, *packed)[0] - wanted).max() > 0.1


@pytest.mark.parametrize("lengths", [[9, 9], [40, 17, 3]], ids=["within the window", "beyond the window"])
def test_bidirectional_local_layers_equal_those_of_transformers(lengths, tmp_path):
  theirs = tiny_decoders.hf_decoder("gemma3_text")
  theirs.save_pretrained(tmp_path)
  graphdef, params = tiny_decoders.our_decoder(tmp_path, bidirectional=True)
  settings = theirs.config.to_dict() | {"use_bidirectional_attention": True}
  model = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**settings, attn_implementation="eager"))
  model.load_state_dict(theirs.state_dict())
  texts = tiny_encoders.texts(lengths)
  tokens, mask = tiny_encoders.padded(texts)
  with torch.no_grad():
    wanted = tiny_decoders.run_theirs(model.eval(), tokens, mask).last_hidden_state.numpy()[mask > 0]
  packed = tiny_encoders.packed([texts], sum(lengths))
  np.testing.assert_allclose(_run(graphdef)(params, *packed)[0], wanted, atol=1e-4, rtol=0)
  wide = tiny_decoders.abstract(**hf_config.encoder_arguments(tmp_path) | {"window": 80}, bidirectional=True)[0]
  found = np.abs(_run(wide)(params, *packed)[0] - wanted).max()
  assert found > 0.01 if max(lengths) > 9 else found < 1e-4


def test_gradients_equal_those_of_torch_with_recomputed_activations(pair):
  kind, folder, theirs, _, params = pair
  tokens, mask = tiny_encoders.padded(tiny_encoders.texts([7, 12]))
  weights = np.random.default_rng(0).normal(size=(*tokens.shape, tiny_decoders.DIM)).astype(np.float32)
  weights *= mask[..., None]
  theirs.zero_grad()
  (tiny_decoders.run_theirs(theirs, tokens, mask).last_hidden_state * torch.tensor(weights)).sum().backward()
  wanted = engine.flatten_tree(engine.apply(tables.TABLES[kind], tiny_encoders.Gradients(theirs), params))
  graphdef = tiny_decoders.abstract(**hf_config.encoder_arguments(folder), remat=True)[0]
  ours = [jnp.asarray(x) for x in (tokens, mask, np.broadcast_to(np.arange(12), tokens.shape))]

  def loss(params):
    return (merge_params(graphdef, params)(*ours) * weights).sum()

  found = engine.flatten_tree(jax.jit(jax.grad(loss))(params))
  for name, gradient in wanted.items():
    scale = max(np.abs(gradient).max(), 0.1)  # The gradient of the key's bias is zero except for rounding.
    np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("scaling", [None, (8.0,), (32.0, 1.0, 4.0, 8192)])
def test_rotary_frequencies_equal_those_of_transformers(scaling):
  rope = {"rope_type": "default", "rope_theta": 5e5}
  if scaling is not None:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    kind = "linear" if len(scaling) == 1 else "llama3"
    rope |= {"rope_type": kind} | dict(zip(keys, scaling, strict=len(scaling) > 1))
  settings = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=rope)
  theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(settings)
  np.testing.assert_allclose(rotary_attention.rotary_frequencies(64, 5e5, scaling), theirs.inv_freq, rtol=1e-5)


def test_heads_that_are_not_divisible_raise_an_error():
  arguments = tiny_decoders.published("qwen2.5-0.5b")
  for change in ({"num_kv_heads": 4}, {"head_dim": 63}):
    with pytest.raises(ValueError, match="num_heads 14 must be a multiple"):
      tiny_decoders.abstract(**arguments | change)


@pytest.mark.parametrize("name", tiny_decoders.PARAMETERS)
def test_full_size_decoders_have_as_many_parameters_as_published(name):
  _, shapes, axes = tiny_decoders.abstract(**tiny_decoders.published(name), param_dtype="bfloat16")
  leaves = jax.tree.leaves(shapes)
  assert sum(math.prod(leaf.shape) for leaf in leaves) == tiny_decoders.PARAMETERS[name]
  assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
  assert axes["layers"]["attention"]["key"]["kernel"] == ("layers", "embed", "kv_heads", "head_dim")
