"""Folders of adapters in PEFT's format, and configs of encoders: valid ones, and mutations of each key."""

import json

from hypothesis import strategies as st
import jax
import numpy as np

from tests.bad_input import values, weights
from tests.bad_input.campaign import Expected, refused
from tests.bad_input.mutations import mutations_of
from vixml_jax.weights import engine, peft

RANK, ALPHA = 4, 6.0
_DIM, _HEADS, _KV_HEADS, _HEAD_DIM, _MLP, _LAYERS = 8, 4, 2, 2, 12, 2


def _shapes():
  """Returns the shapes of the adapters of a decoder."""
  inputs = dict.fromkeys(("query", "key", "value"), (_DIM,)) | {"output": (_HEADS, _HEAD_DIM)}
  outputs = {
    "query": (_HEADS, _HEAD_DIM),
    "key": (_KV_HEADS, _HEAD_DIM),
    "value": (_KV_HEADS, _HEAD_DIM),
    "output": (_DIM,),
  }
  pairs = {f"attention/{name}": (inputs[name], outputs[name]) for name in inputs}
  pairs |= {"gate": ((_DIM,), (_MLP,)), "up": ((_DIM,), (_MLP,)), "down": ((_MLP,), (_DIM,))}
  flat = {}
  for name, (size, result) in pairs.items():
    flat[f"layers/{name}/lora_a"] = jax.ShapeDtypeStruct((_LAYERS, *size, RANK), np.float32)
    flat[f"layers/{name}/lora_b"] = jax.ShapeDtypeStruct((_LAYERS, RANK, *result), np.float32)
  return engine.unflatten_tree(flat)


ABSTRACT = _shapes()
ADAPTERS = jax.tree.map(
  lambda leaf, seed: np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32),
  ABSTRACT,
  jax.tree.unflatten(jax.tree.structure(ABSTRACT), list(range(len(jax.tree.leaves(ABSTRACT))))),
)
TENSORS = {f"base_model.model.{name}": tensor for name, tensor in engine.invert(peft.TABLE, ADAPTERS).items()}
CONFIG = {
  "peft_type": "LORA",
  "task_type": None,
  "r": RANK,
  "lora_alpha": ALPHA,
  "use_rslora": True,
  "lora_dropout": 0.1,
  "bias": "none",
  "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
  "init_lora_weights": True,
  "fan_in_fan_out": False,
  "modules_to_save": None,
  "rank_pattern": {},
}
QWEN = {
  "model_type": "qwen2",
  "vocab_size": 64,
  "num_hidden_layers": 2,
  "hidden_size": 8,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 12,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "hidden_act": "silu",
}
BERT = {
  "model_type": "bert",
  "vocab_size": 64,
  "num_hidden_layers": 2,
  "hidden_size": 8,
  "num_attention_heads": 4,
  "intermediate_size": 12,
  "max_position_embeddings": 32,
  "type_vocab_size": 2,
  "hidden_dropout_prob": 0.1,
  "attention_probs_dropout_prob": 0.1,
  "layer_norm_eps": 1e-12,
  "hidden_act": "gelu",
}
_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 500000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


MUTATIONS = {}
mutation = mutations_of(MUTATIONS)


def _adapter(config=CONFIG, content=None):
  header, data = weights.entries(TENSORS)
  return {
    "adapter_config.json": json.dumps(config).encode() if isinstance(config, dict) else config,
    "adapter_model.safetensors": weights.safetensors(header, data) if content is None else content,
  }


WORKS = Expected("adapters")
_IMMATERIAL = ("task_type", "lora_dropout")
_BAD_NUMBERS = st.sampled_from(
  [None, True, False, "4", "", [], {}, 0, -1, 3, 4.5, 1e39, float("nan"), float("inf"), 10**30, 10**400, -(10**400)]
)


@mutation
def good_adapter(draw):
  config = CONFIG | {draw(st.sampled_from(_IMMATERIAL)): draw(values.JSON_VALUES)}
  if draw(st.booleans()):
    del config[draw(st.sampled_from(["peft_type", "bias", "init_lora_weights", "target_modules", "rank_pattern"]))]
  return _adapter(config | {"target_modules": draw(st.sampled_from([CONFIG["target_modules"], "all-linear"]))}), WORKS


@mutation
def rank_or_alpha(draw):
  key = draw(st.sampled_from(["r", "lora_alpha"]))
  config = CONFIG | {key: draw(_BAD_NUMBERS)}
  if draw(st.booleans()):
    config["use_rslora"] = False
  return _adapter(config), refused("adapter_config.json", key)


@mutation
def stabilized_scale(draw):
  value = draw(st.one_of(st.just(False), values.values_except(bool)))
  return _adapter(CONFIG | {"use_rslora": value}), refused("adapter_config.json", "use_rslora")


@mutation
def type_or_bias(draw):
  key = draw(st.sampled_from(["peft_type", "bias"]))
  value = draw(st.one_of(values.JSON_VALUES, st.sampled_from(["all", "lora_only", "IA3", "lora"])))
  return _adapter(CONFIG | {key: value}), refused("adapter_config.json", key)


@mutation
def initial_values(draw):
  value = draw(st.sampled_from(["pissa", "olora", "corda", "loftq", "pissa_niter_4", [], {}, None, 2]))
  return _adapter(CONFIG | {"init_lora_weights": value}), refused("adapter_config.json", "init_lora_weights")


@mutation
def projections(draw):
  few = [[], ["q_proj"], CONFIG["target_modules"][1:], [*CONFIG["target_modules"], "lm_head"], [None] * 7, [[]] * 7]
  value = draw(st.one_of(st.sampled_from(few), values.values_except(str, list, type(None))))
  return _adapter(CONFIG | {"target_modules": value}), refused("adapter_config.json", "target_modules")


@mutation
def feature_that_is_not_supported(draw):
  keys = ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "layers_to_transform", "x" * 10_000, "a\nb")
  value = draw(st.sampled_from([True, 1, "a", ["lm_head"], {"q_proj": 8}, 10**400, "y" * 100_000]))
  return _adapter(CONFIG | {draw(st.sampled_from(keys)): value}), refused("adapter_config.json")


@mutation
def other_config_of_adapters(draw):
  content = draw(
    st.sampled_from([b"", b"{", b"[]", b"null", b"\xff", b"[" * 99_999, b"{}", b'{"r": ' + b"9" * 5_000 + b"}"])
  )
  return _adapter(content), refused("adapter_config.json")


@mutation
def key_twice(draw):
  key = draw(st.sampled_from(["r", "lora_alpha", "use_rslora"]))
  text = json.dumps(CONFIG)
  return _adapter((text[:-1] + f', "{key}": {json.dumps(CONFIG[key])}' + "}").encode()), refused("adapter_config", key)


@mutation
def tensors_of_adapters(draw):
  name = draw(st.sampled_from(sorted(TENSORS)))
  kind = draw(st.sampled_from(["missing", "more", "shape", "cut"]))
  tensors = dict(TENSORS)
  if kind == "missing":
    del tensors[name]
  elif kind == "more":
    tensors[name + ".more\n"] = tensors[name]
  elif kind == "shape":
    tensors[name] = tensors[name].T.copy() if tensors[name].shape[0] != tensors[name].shape[1] else tensors[name][:1]
  content = weights.safetensors(*weights.entries(tensors))
  return _adapter(content=values.cut_off(draw, content) if kind == "cut" else content), refused()


@mutation
def missing_file_of_adapters(draw):
  files, name = _adapter(), draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
  del files[name]
  return files, refused(name)


def _config(config):
  return {"config.json": json.dumps(config).encode()}


@mutation
def good_config(draw):
  config = draw(st.sampled_from([QWEN, BERT, QWEN | {"model_type": "llama", "rope_parameters": _ROPE}]))
  return _config(config | {f"other{draw(values.TEXTS)}": draw(values.JSON_VALUES)}), Expected("config")


@mutation
def value_of_a_config(draw):
  config = draw(st.sampled_from([QWEN, BERT]))
  key = draw(st.sampled_from(sorted(config)))
  bad = st.sampled_from(
    [None, True, "8", "", [], {}, -1, -0.5, 2**31, 10**30, 1e300, float("nan"), float("inf"), 10**400]
  )
  value = draw(st.one_of(bad, values.values_except(int, float)))
  if key == "num_key_value_heads" and value is None:
    value = -1  # A config without the key has as many as heads.
  return _config(config | {key: value}), refused("config.json", key)


@mutation
def value_of_rotary_positions(draw):
  key = draw(st.sampled_from(sorted(_ROPE)))
  bad = st.sampled_from([None, True, "8", "", [], {}, -1, 0, 10**30, 1e300, float("nan"), float("inf"), 10**400])
  rope = _ROPE | {key: draw(bad)}
  return _config(QWEN | {"model_type": "llama", "rope_parameters": rope}), refused("config.json")


@mutation
def structure_of_a_config(draw):
  key = draw(st.sampled_from(["rope_parameters", "rope_scaling", "layer_types"]))
  value = draw(st.sampled_from([3, "linear", ["sliding_attention"], [[]], [1], True, 1.5, "", 0, False]))
  return _config(QWEN | {key: value}), refused("config.json", key)
