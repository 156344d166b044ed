"""The config.json of published models: understood, completed, or an error that names the key."""

import json

import pytest
import transformers

from tests.helpers import tiny_decoders, tiny_encoders
from vixml_jax.errors import InputError
from vixml_jax.weights import hf_config

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
_OLD_GEMMA = {  # As published with gemma-3-1b-it.
  "architectures": ["Gemma3ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "attn_logit_softcapping": None,
  "bos_token_id": 2,
  "cache_implementation": "hybrid",
  "eos_token_id": [1, 106],
  "final_logit_softcapping": None,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 1152,
  "initializer_range": 0.02,
  "intermediate_size": 6912,
  "max_position_embeddings": 32768,
  "model_type": "gemma3_text",
  "num_attention_heads": 4,
  "num_hidden_layers": 26,
  "num_key_value_heads": 1,
  "pad_token_id": 0,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_local_base_freq": 10000,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 6,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.50.0.dev0",
  "use_cache": True,
  "vocab_size": 262144,
}
_OLD_GEMMA_WITH_IMAGES = {  # The keys of this package in the config that is published with gemma-3-4b-it.
  "architectures": ["Gemma3ForConditionalGeneration"],
  "model_type": "gemma3",
  "text_config": {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  },
}
_OLD = {
  "qwen2.5-0.5b": _OLD_QWEN2,
  "qwen3-0.6b": _OLD_QWEN3,
  "llama-3.2-1b": _OLD_LLAMA,
  "gemma-3-1b": _OLD_GEMMA,
  "gemma-3-4b": _OLD_GEMMA_WITH_IMAGES,
}
_ABSENT = object()


def _arguments(folder, settings, **changes):
  changed = {key: value for key, value in (settings | changes).items() if value is not _ABSENT}
  (folder / "config.json").write_text(json.dumps(changed))
  return hf_config.encoder_arguments(folder)


def _encoder_config(kind, folder):
  """Writes the config of a tiny BERT or DistilBERT."""
  tiny_encoders.transformers_config(kind).save_pretrained(folder)
  return folder


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_arguments_of_encoders_come_from_the_config(kind, tmp_path):
  assert hf_config.encoder_arguments(_encoder_config(kind, tmp_path)) == {
    "vocab_size": 50,
    "num_layers": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "mlp_dim": 48,
    "max_position": 24,
    "num_token_types": 2 if kind == "bert" else 0,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "projection_dropout": 0.1 if kind == "bert" else 0.0,
    "layer_norm_eps": 1e-12,
  }


@pytest.mark.parametrize("name", _OLD)
def test_published_configs_are_understood(name, tmp_path):
  assert _arguments(tmp_path, _OLD[name]) == tiny_decoders.published(name)


@pytest.mark.parametrize("kind", tiny_decoders.KINDS)
def test_configs_of_transformers_5_are_understood(kind, tmp_path):
  theirs = tiny_decoders.transformers_config(kind)
  theirs.save_pretrained(tmp_path)
  rope = hf_config.read_config(tmp_path)["rope_parameters"]
  is_gemma = kind == "gemma3_text"
  assert "rope_theta" in (rope["sliding_attention"] if is_gemma else rope)
  assert hf_config.encoder_arguments(tmp_path) == {
    "vocab_size": 50,
    "num_layers": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 12 if kind == "qwen3" or is_gemma else 8,
    "mlp_dim": 48,
    "rope_theta": 1e6 if is_gemma else 10000.0,
    "rope_scaling": tiny_decoders.ROPE_SCALING if kind == "llama" else (4.0,) if is_gemma else None,
    "norm_eps": theirs.rms_norm_eps,
    "qkv_bias": kind == "qwen2",
    "qk_norm": kind == "qwen3" or is_gemma,
    "zero_centered_norm": is_gemma,
    "output_norm": is_gemma,
    "activation": "gelu_pytorch_tanh" if is_gemma else "silu",
    "scale_embedding": is_gemma,
    "attention_scalar": tiny_decoders.ATTENTION_SCALAR if is_gemma else 0,
    "global_every": tiny_decoders.GLOBAL_EVERY if is_gemma else 1,
    "window": tiny_decoders.WINDOW if is_gemma else 0,
    "local_rope_theta": 10000.0,
  }


def test_missing_keys_of_gemma_have_the_values_of_transformers(tmp_path):
  sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "sliding_window": 32}
  found = _arguments(tmp_path, {"model_type": "gemma3", "text_config": sizes})
  transformers.Gemma3TextConfig(**sizes).save_pretrained(tmp_path)
  assert found == hf_config.encoder_arguments(tmp_path)
  assert (found["global_every"], found["window"], found["num_heads"], found["rope_theta"]) == (6, 32, 8, 1e6)


@pytest.mark.parametrize("every,stated", [(3, 6), (6, 6), (1, 6), (9, 6), (6, 3)])
def test_the_types_of_layers_decide_which_layers_are_global(every, stated, tmp_path):
  layer_types = ["sliding_attention" if layer % every else "full_attention" for layer in range(1, 8)]
  config = transformers.Gemma3TextConfig(num_hidden_layers=7, layer_types=layer_types, sliding_window_pattern=stated)
  config.save_pretrained(tmp_path)
  found = hf_config.encoder_arguments(tmp_path)
  assert [layer % found["global_every"] != 0 for layer in range(1, 8)] == ["sliding" in kind for kind in layer_types]
  assert found["window"] == (0 if every == 1 else 4096)
  (tmp_path / "config.json").write_text(json.dumps(hf_config.config_of(found)))
  assert transformers.AutoConfig.from_pretrained(tmp_path).layer_types == layer_types


def test_missing_keys_follow_from_the_others(tmp_path):
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
  "change, message",
  [
    ({"model_type": "roberta"}, "model_type is 'roberta'"),
    ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ({"hidden_size": None}, "has no key hidden_size"),
    ({"model_type": None}, "model_type is None"),
  ],
)
def test_unsupported_configs_of_encoders_raise_an_error_that_names_the_key(change, message, tmp_path):
  folder = _encoder_config("bert", tmp_path)
  settings = {k: v for k, v in (hf_config.read_config(folder) | change).items() if v is not None}
  (folder / "config.json").write_text(json.dumps(settings))
  with pytest.raises(InputError, match=message):
    hf_config.encoder_arguments(folder)


@pytest.mark.parametrize(
  "settings, changes, message",
  [
    (_OLD_QWEN2, {"use_sliding_window": True}, "use_sliding_window is True; the encoder supports only False"),
    (_OLD_QWEN3, {"use_sliding_window": True}, "use_sliding_window is True"),
    (_OLD_QWEN3, {"attention_bias": True}, "attention_bias is True"),
    (_OLD_LLAMA, {"attention_bias": True}, "attention_bias is True"),
    (_OLD_LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
    (_OLD_LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the encoder supports only 'silu'"),
    (_OLD_QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
    (_OLD_QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is of type 'yarn'"),
    (
      _OLD_QWEN3,
      {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
      "rope_parameters is of type 'dynamic'; the encoder supports only 'default', 'linear' and 'llama3'",
    ),
    (_OLD_LLAMA, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    (
      _OLD_LLAMA,
      {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
      "rope_scaling has no high_freq_factor, original_max_position_embeddings",
    ),
    (_OLD_LLAMA, {"rope_theta": _ABSENT}, "has no key rope_theta"),
    *((_OLD_QWEN2, {"num_key_value_heads": value}, "num_key_value_heads is ") for value in ("", 0, False, [], {})),
    *((_OLD_QWEN2, {"layer_types": value}, "layer_types is .* must be a list") for value in ("", 0, False, {})),
    *((_OLD_QWEN2, {"rope_parameters": value}, "rope_parameters is .* object") for value in ("", 0, False, [])),
    *((_OLD_QWEN2, {"rope_scaling": value}, "rope_scaling is .* must be an object") for value in ("", 0, False, [])),
    (_OLD_QWEN3, {"head_dim": _ABSENT}, "has no key head_dim"),
    (_OLD_LLAMA, {"head_dim": _ABSENT, "num_attention_heads": 31}, "2048 is not divisible by num_attention_heads 31"),
    (_OLD_LLAMA, {"model_type": "gemma2"}, "model_type is 'gemma2'; it must be one of bert, .*, llama, gemma3_text"),
    (_OLD_GEMMA, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; the encoder supports only"),
    (_OLD_GEMMA, {"attention_bias": True}, "attention_bias is True"),
    (_OLD_GEMMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; the encoder supports only None"),
    (_OLD_GEMMA, {"layer_types": ["sliding_attention"] * 25}, "layer_types are not those of num_hidden_layers=26"),
    (
      _OLD_GEMMA,
      {"layer_types": ["sliding_attention", "full_attention", "full_attention", *["sliding_attention"] * 23]},
      "layer_types are not those of",
    ),
    (_OLD_GEMMA, {"layer_types": ["chunked_attention"] * 26}, "layer_types are not those of"),
    (_OLD_GEMMA, {"layer_types": {}}, "layer_types is .* must be a list"),
    *((_OLD_GEMMA, {"sliding_window": value}, "sliding_window is ") for value in (None, "", 0, -1, 1.5, 2**25)),
    (_OLD_GEMMA, {"sliding_window": _ABSENT}, "has no key sliding_window"),
    *((_OLD_GEMMA, {"sliding_window_pattern": value}, "sliding_window_pattern is ") for value in (None, 0, "6", [])),
    *((_OLD_GEMMA, {"query_pre_attn_scalar": value}, "query_pre_attn_scalar is ") for value in (None, "", 0, -1, [])),
    (_OLD_GEMMA, {"rope_local_base_freq": 0}, "rope_local_base_freq is 0; it must be a positive number"),
    (_OLD_GEMMA, {"num_hidden_layers": 2**30}, "num_hidden_layers is "),
    (_OLD_GEMMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling has no factor"),
    *(
      (_OLD_GEMMA, {"rope_parameters": {kind: value}}, "rope_parameters has .*; it must have objects")
      for kind in ("sliding_attention", "full_attention")
      for value in (7, 0, "", [])
    ),
    (
      _OLD_GEMMA,
      {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
      "rope_parameters of sliding_attention is scaled",
    ),
    *(({"model_type": "gemma3"}, {"text_config": value}, "text_config is .* object") for value in (None, 0, [], "")),
  ],
)
def test_unsupported_configs_of_decoders_raise_an_error_that_names_the_key(settings, changes, message, tmp_path):
  with pytest.raises(InputError, match=message) as error:
    _arguments(tmp_path, settings, **changes)
  assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_a_missing_or_damaged_config_raises_an_error_that_names_it(tmp_path):
  folder = _encoder_config("bert", tmp_path)
  for content in ("{", "[]"):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: is not"):
      hf_config.read_config(folder)
  (folder / "config.json").unlink()
  with pytest.raises(InputError, match=r"config\.json: cannot be read"):
    hf_config.read_config(folder)


def test_sizes_of_an_encoder_that_contradict_the_weights_raise_an_error(tmp_path):
  _encoder_config("bert", tmp_path)
  arguments = hf_config.encoder_arguments(tmp_path)
  hf_config.check_arguments(tmp_path, arguments | {"dropout": 0.3, "dtype": "bfloat16", "remat": True})
  with pytest.raises(InputError, match=r"num_layers=3, but encoder\.num_layers is 6; set it to 3"):
    hf_config.check_arguments(tmp_path, arguments | {"num_layers": 6})


def test_sizes_of_a_decoder_that_contradict_the_weights_raise_an_error(tmp_path):
  arguments = _arguments(tmp_path, _OLD_LLAMA)
  hf_config.check_arguments(tmp_path, arguments | {"lora_rank": 8, "lora_alpha": 8.0, "bidirectional": True})
  with pytest.raises(InputError, match=r"the weights have rope_scaling=\(32.*encoder\.rope_scaling is None"):
    hf_config.check_arguments(tmp_path, arguments | {"rope_scaling": None})
