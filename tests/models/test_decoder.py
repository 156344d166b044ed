"""Decoders against transformers: hidden states, packing, gradients, both directions of the weights, configs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
import torch
import transformers

from tests.helpers import tiny_decoders, tiny_encoders
from vixml_jax.errors import InputError
from vixml_jax.models import decoder, layers
from vixml_jax.weights import engine, hf_config, hf_folder, tables


@pytest.fixture(scope="module", params=tiny_decoders.KINDS)
def pair(request, tmp_path_factory):
  """Kind, folder, model of transformers, structure and parameters of ours."""
  folder = tmp_path_factory.mktemp(request.param)
  theirs = tiny_decoders.hf_decoder(request.param)
  theirs.save_pretrained(folder)
  return request.param, folder, theirs, *tiny_decoders.our_decoder(folder)


def _run(graphdef):
  return jax.jit(lambda params, *x: layers.merge_params(graphdef, params)(*x))


def test_every_layer_is_that_of_transformers(pair):
  _, _, theirs, graphdef, params = pair
  tokens, mask = tiny_encoders.padded(tiny_encoders.texts([40, 40]))
  with torch.no_grad():
    wanted = tiny_decoders.run_theirs(theirs, tokens, mask, output_hidden_states=True)

  @jax.jit
  def run(params):
    ours = layers.merge_params(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(40), tokens.shape)
    hidden = ours.encode_layers(ours.embed_tokens(jnp.asarray(tokens)), jnp.asarray(mask), positions)
    return hidden, ours.final_norm(hidden[-1])

  found, last = run(params)
  assert len(found) == len(wanted.hidden_states) == tiny_decoders.LAYERS + 1
  # The last of theirs is normed.
  for ours_layer, their_layer in zip([*found[:-1], last], wanted.hidden_states, strict=True):
    np.testing.assert_allclose(ours_layer, their_layer, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_packed_into_rows_equal_padded_texts_of_transformers(pair, side):
  _, _, theirs, graphdef, params = pair
  rows = [tiny_encoders.texts([5, 9, 3], 1), tiny_encoders.texts([17, 2], 2), tiny_encoders.texts([1], 3)]
  tokens, mask = tiny_encoders.padded([text for row in rows for text in row])
  if side == "left":
    for row, length in enumerate(mask.sum(1)):
      tokens[row], mask[row] = (np.roll(x[row], -length) for x in (tokens, mask))
  with torch.no_grad():
    wanted = tiny_decoders.run_theirs(theirs, tokens, mask).last_hidden_state.numpy()
  packed = tiny_encoders.packed(rows, 20)
  hidden = _run(graphdef)(params, *packed)
  found = np.concatenate(
    [hidden[row][packed[1][row] == slot] for row in range(3) for slot in range(1, len(rows[row]) + 1)]
  )
  np.testing.assert_allclose(found, wanted[mask > 0], atol=1e-4, rtol=0)
  assert np.isfinite(hidden).all()


def test_bidirectional_is_transformers_with_a_full_mask(pair):
  _, folder, theirs, causal, params = pair
  lengths = [7, 11]
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


def test_gradients_are_those_of_torch_also_when_activations_are_recomputed(pair):
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
    return (layers.merge_params(graphdef, params)(*ours) * weights).sum()

  found = engine.flatten_tree(jax.jit(jax.grad(loss))(params))
  for name, gradient in wanted.items():
    scale = max(np.abs(gradient).max(), 0.1)  # That of the key's bias is zero but for rounding.
    np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_grouped_causal_attention_is_that_of_torch_for_each_segment():
  rng = np.random.default_rng(0)
  query, key, value = (rng.normal(size=(2, 9, heads, 8)).astype(np.float32) for heads in (6, 2, 2))
  segments = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 2, 2, 0, 0, 0]])
  ours = layers.segment_attention(*map(jnp.asarray, (query, key, value, segments)), causal=True)
  for row, slot in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
    members = segments[row] == slot
    wanted = torch.nn.functional.scaled_dot_product_attention(
      *(torch.tensor(x[row, members]).transpose(0, 1) for x in (query, key, value)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    np.testing.assert_allclose(ours[row, members], wanted, atol=1e-6)
  assert np.isfinite(ours).all()


def test_rms_norm_is_that_of_torch():
  norm = layers.RMSNorm(16, 1e-5)
  rng = np.random.default_rng(0)
  scale, x = rng.normal(size=16).astype(np.float32), rng.normal(size=(3, 16)).astype(np.float32)
  norm.scale.set_value(jnp.asarray(scale))
  wanted = torch.nn.functional.rms_norm(torch.tensor(x), (16,), torch.tensor(scale), 1e-5)
  np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, atol=1e-6)
  assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("scaling", [None, (32.0, 1.0, 4.0, 8192)])
def test_rotary_frequencies_are_those_of_transformers(scaling):
  rope = {"rope_type": "default", "rope_theta": 5e5}
  if scaling is not None:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope |= {"rope_type": "llama3"} | dict(zip(keys, scaling, strict=True))
  settings = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=rope)
  theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(settings)
  np.testing.assert_allclose(decoder.rotary_frequencies(64, 5e5, scaling), theirs.inv_freq, rtol=1e-5)


def test_heads_that_do_not_divide_are_refused():
  arguments = tiny_decoders.published("qwen2.5-0.5b")
  for change in ({"num_kv_heads": 4}, {"head_dim": 63}):
    with pytest.raises(ValueError, match="num_heads 14 must be a multiple"):
      tiny_decoders.abstract(**arguments | change)


def test_there_and_back_is_the_identity_and_transformers_computes_the_same(pair, tmp_path):
  kind, folder, theirs, _, params = pair
  hf_folder.save_pretrained(params, tmp_path, hf_config.read_config(folder), tables.TABLES[kind])
  before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
  assert set(before) == set(after)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  again, report = transformers.AutoModel.from_pretrained(
    tmp_path, output_loading_info=True, attn_implementation="eager"
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  tokens = torch.arange(20).reshape(2, 10)
  with torch.no_grad():
    assert torch.equal(again.eval()(tokens).last_hidden_state, theirs(tokens).last_hidden_state)


def test_models_with_an_output_head_load_by_their_prefix(pair, tmp_path):
  kind, _, theirs, _, params = pair
  made = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
  whole = getattr(transformers, made[kind])(theirs.config)
  whole.model.load_state_dict(theirs.state_dict())
  whole.save_pretrained(tmp_path)
  names = set(load_file(tmp_path / "model.safetensors"))
  assert {"lm_head.weight", "model.norm.weight"} <= names
  jax.tree.map(np.testing.assert_array_equal, tiny_decoders.our_decoder(tmp_path)[1], params)


def test_a_table_covers_every_parameter_of_the_decoder_once(pair):
  kind, _, _, _, params = pair
  assert sorted(rule.ours for rule in tables.TABLES[kind].rules) == sorted(engine.flatten_tree(params))


@pytest.mark.parametrize("name", tiny_decoders.PARAMETERS)
def test_full_size_decoders_have_as_many_parameters_as_published(name):
  _, shapes, axes = tiny_decoders.abstract(**tiny_decoders.published(name), param_dtype="bfloat16")
  leaves = jax.tree.leaves(shapes)
  assert sum(math.prod(leaf.shape) for leaf in leaves) == tiny_decoders.PARAMETERS[name]
  assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
  assert axes["layers"]["attention"]["key"]["kernel"] == ("layers", "embed", "kv_heads", "head_dim")


_OLD_QWEN2 = {  # As published with Qwen2.5-0.5B-Instruct.
  "architectures": ["Qwen2ForCausalLM"],
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "hidden_act": "silu",
  "hidden_size": 896,
  "initializer_range": 0.02,
  "intermediate_size": 4864,
  "max_position_embeddings": 32768,
  "max_window_layers": 21,
  "model_type": "qwen2",
  "num_attention_heads": 14,
  "num_hidden_layers": 24,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "use_cache": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
_OLD_QWEN3 = {  # As published with Qwen3-0.6B.
  "attention_bias": False,
  "attention_dropout": 0.0,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 1024,
  "intermediate_size": 3072,
  "max_position_embeddings": 40960,
  "max_window_layers": 28,
  "model_type": "qwen3",
  "num_attention_heads": 16,
  "num_hidden_layers": 28,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": None,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
_OLD_LLAMA = {  # As published with Llama-3.2-1B.
  "attention_bias": False,
  "attention_dropout": 0.0,
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 16,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "vocab_size": 128256,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
}
_OLD = {"qwen2.5-0.5b": _OLD_QWEN2, "qwen3-0.6b": _OLD_QWEN3, "llama-3.2-1b": _OLD_LLAMA}
_ABSENT = object()


def _arguments(folder, settings, **changes):
  changed = {key: value for key, value in (settings | changes).items() if value is not _ABSENT}
  (folder / "config.json").write_text(json.dumps(changed))
  return hf_config.encoder_arguments(folder)


@pytest.mark.parametrize("name", _OLD)
def test_published_configs_are_understood(name, tmp_path):
  assert _arguments(tmp_path, _OLD[name]) == tiny_decoders.published(name)


def test_configs_that_transformers_5_writes_are_understood(pair):
  kind, folder, theirs, _, _ = pair
  assert "rope_theta" in hf_config.read_config(folder)["rope_parameters"]
  assert hf_config.encoder_arguments(folder) == {
    "vocab_size": 50,
    "num_layers": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 12 if kind == "qwen3" else 8,
    "mlp_dim": 48,
    "rope_theta": 10000.0,
    "rope_scaling": tiny_decoders.ROPE_SCALING if kind == "llama" else None,
    "norm_eps": theirs.config.rms_norm_eps,
    "qkv_bias": kind == "qwen2",
    "qk_norm": kind == "qwen3",
  }


def test_what_a_config_leaves_out_follows_from_the_rest(tmp_path):
  found = _arguments(
    tmp_path,
    _OLD_LLAMA,
    head_dim=_ABSENT,
    num_key_value_heads=_ABSENT,
    mlp_bias=_ABSENT,
    attention_bias=_ABSENT,
    rope_scaling=_ABSENT,
  )
  assert (found["head_dim"], found["num_kv_heads"], found["rope_scaling"]) == (64, 32, None)
  assert _arguments(tmp_path, _OLD_QWEN2, use_sliding_window=_ABSENT)["head_dim"] == 64


@pytest.mark.parametrize(
  "settings, changes, message",
  [
    (_OLD_QWEN2, {"use_sliding_window": True}, "use_sliding_window is True; the encoder only does False"),
    (_OLD_QWEN3, {"use_sliding_window": True}, "use_sliding_window is True"),
    (_OLD_QWEN3, {"attention_bias": True}, "attention_bias is True"),
    (_OLD_LLAMA, {"attention_bias": True}, "attention_bias is True"),
    (_OLD_LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
    (_OLD_LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the encoder only does 'silu'"),
    (_OLD_QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
    (_OLD_QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is of type 'yarn'"),
    (
      _OLD_QWEN3,
      {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
      "rope_parameters is of type 'linear'",
    ),
    (_OLD_LLAMA, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    (
      _OLD_LLAMA,
      {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
      "rope_scaling has no high_freq_factor, original_max_position_embeddings",
    ),
    (_OLD_LLAMA, {"rope_theta": _ABSENT}, "has no key rope_theta"),
    (_OLD_QWEN3, {"head_dim": _ABSENT}, "has no key head_dim"),
    (_OLD_LLAMA, {"head_dim": _ABSENT, "num_attention_heads": 31}, "2048 does not divide by num_attention_heads 31"),
    (_OLD_LLAMA, {"model_type": "gemma3_text"}, "model_type is 'gemma3_text'; known are bert, .*, llama"),
  ],
)
def test_configs_of_other_models_are_refused_by_key(settings, changes, message, tmp_path):
  with pytest.raises(InputError, match=message) as error:
    _arguments(tmp_path, settings, **changes)
  assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_decoder_dims_that_contradict_the_weights_are_named(tmp_path):
  arguments = _arguments(tmp_path, _OLD_LLAMA)
  hf_config.check_arguments(tmp_path, arguments | {"lora_rank": 8, "lora_alpha": 8.0, "bidirectional": True})
  with pytest.raises(InputError, match=r"the weights have rope_scaling=\(32.*encoder\.rope_scaling is None"):
    hf_config.check_arguments(tmp_path, arguments | {"rope_scaling": None})
