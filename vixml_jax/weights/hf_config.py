"""Converts the `config.json` of Hugging Face to the arguments of our encoders, and back."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.files import read_json_object
from vixml_jax.models.attention_call import reach_of
from vixml_jax.weights.hf_decoder_config import decoder_arguments, decoder_config
from vixml_jax.weights.hf_values import check_numbers, value_of

# The families differ in a few switches. Arguments that depend on several keys are in `hf_decoder_config`.
_DECODER: dict[str, str | float] = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "embed_dim": "hidden_size",
  "num_heads": "num_attention_heads",
  "mlp_dim": "intermediate_size",
  "norm_eps": "rms_norm_eps",
  "qkv_bias": False,
  "qk_norm": False,
  "zero_centered_norm": False,
  "output_norm": False,
  "activation": "hidden_act",
  "scale_embedding": False,
}
_WITHOUT_LOCAL_LAYERS: dict[str, str | float] = {
  "attention_scalar": 0,
  "global_every": 1,
  "window": 0,
  "local_rope_theta": 1e4,
}

# Argument of models.bert.BertEncoder or models.decoder.Decoder -> key in config.json, or a constant value.
_ARGUMENTS: dict[str, dict[str, str | float]] = {
  "bert": {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_position": "max_position_embeddings",
    "num_token_types": "type_vocab_size",  # nosec B105 - a token of a text.
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "projection_dropout": "hidden_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
  },
  "distilbert": {
    "vocab_size": "vocab_size",
    "num_layers": "n_layers",
    "embed_dim": "dim",
    "num_heads": "n_heads",
    "mlp_dim": "hidden_dim",
    "max_position": "max_position_embeddings",
    "num_token_types": 0,  # nosec B105 - a token of a text.
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "projection_dropout": 0.0,
    "layer_norm_eps": 1e-12,
  },
  # The head_dim of Qwen3 and Gemma 3 does not follow from other keys.
  "qwen2": _DECODER | _WITHOUT_LOCAL_LAYERS | {"qkv_bias": True},
  "qwen3": _DECODER | _WITHOUT_LOCAL_LAYERS | {"qk_norm": True, "head_dim": "head_dim"},
  "llama": _DECODER | _WITHOUT_LOCAL_LAYERS,
  "gemma3_text": _DECODER
  | {
    "qk_norm": True,
    "zero_centered_norm": True,
    "output_norm": True,
    "activation": "hidden_activation",
    "scale_embedding": True,
    "head_dim": "head_dim",
  },
}
_DECODERS = ("qwen2", "qwen3", "llama", "gemma3_text")
_WITH_LOCAL_LAYERS = ("gemma3_text",)

# Values of keys that published configs leave out, which are the defaults of their classes in transformers.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "gemma3_text": {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
  }
}

# Key -> the only value that the encoder supports.
_REQUIRED: dict[str, dict[str, Any]] = {
  "bert": {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
  "distilbert": {"activation": "gelu"},
  "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
  "qwen3": {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
  "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
  "gemma3_text": {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None},
}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads `config.json` in a folder. Of the larger models of Gemma 3, which have an image tower, it is the text's part.

  Raises:
    InputError: If the file cannot be read or is not a JSON object.
  """
  config = _read(folder)
  if config.get("model_type") != "gemma3":
    return config
  text = config.get("text_config")
  if not isinstance(text, dict):
    raise InputError(
      f"{Path(folder) / 'config.json'}: text_config is {text!r:.60}; it must be an object: fetch the file again"
    )
  return {"model_type": "gemma3_text"} | text


def text_part(folder: str | os.PathLike[str]) -> str:
  """Returns the name of the decoder within the model in a folder; "" if the model is the decoder alone.

  Raises:
    InputError: If `config.json` cannot be read or is not a JSON object.
  """
  return "language_model" if _read(folder).get("model_type") == "gemma3" else ""


def encoder_arguments(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the arguments with which our encoder is the model in a folder.

  Args:
    folder: Folder with a `config.json` of `model_type` bert or distilbert (for `models.bert.BertEncoder`), or qwen2,
      qwen3, llama, gemma3_text or gemma3 (for `models.decoder.Decoder`).

  Returns:
    All arguments that the file determines; not dtypes, `remat`, `remat_saved`, adapters, `bidirectional` and `rngs`.

  Raises:
    InputError: If the architecture or one of its variants is not supported, or a key is missing.
  """
  config = read_config(folder)
  path = Path(folder) / "config.json"
  kind = config.get("model_type")
  if not isinstance(kind, str) or kind not in _ARGUMENTS:
    raise InputError(f"{path}: model_type is {kind!r:.60}; it must be one of {', '.join(_ARGUMENTS)}")
  config = _DEFAULTS.get(kind, {}) | config
  for key, wanted in _REQUIRED[kind].items():
    if value_of(config, key, path) != wanted:
      raise InputError(
        f"{path}: {key} is {config[key]!r:.60}; the encoder supports only {wanted!r}: choose another model"
      )
  arguments = {
    argument: value_of(config, key, path) if isinstance(key, str) else key for argument, key in _ARGUMENTS[kind].items()
  }
  names = {argument: key for argument, key in _ARGUMENTS[kind].items() if isinstance(key, str)}
  check_numbers(path, arguments, names)
  if kind not in _DECODERS:
    return arguments
  return arguments | decoder_arguments(config, path, kind in _WITH_LOCAL_LAYERS)


def check_arguments(folder: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
  """Checks that arguments of an encoder agree with a folder's `config.json`.

  Args:
    folder: Folder with `config.json`.
    arguments: Any subset of the encoder's arguments. Those that the file does not determine (`dtype`, `remat`,
      `remat_saved`, adapters) and dropout rates, which do not affect the weights, are not checked.

  Raises:
    InputError: If an argument differs.
  """
  theirs = encoder_arguments(folder)
  path = Path(folder) / "config.json"
  for argument, value in arguments.items():
    if argument.endswith("dropout") or argument not in theirs:
      continue
    if theirs[argument] != value:
      raise InputError(
        f"{path}: the weights have {argument}={theirs[argument]}, but encoder.{argument} is"
        f" {value}; set it to {theirs[argument]} or choose other weights"
      )


def config_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the contents of a `config.json` for the arguments of an encoder; `encoder_arguments` is the inverse.

  The architecture is the simplest one that the arguments allow: an encoder without token types is a DistilBERT, and a
  decoder without biases and without norms of heads is a Llama. Keys that our encoders do not use, such as the token ids
  of a tokenizer, have the defaults of transformers.

  Args:
    arguments: Arguments of `models.bert.BertEncoder` or `models.decoder.Decoder`. Dtypes, `remat`, `remat_saved` and
      adapters are ignored. For a bidirectional decoder the config has the keys of `bidirectional_keys`.

  Raises:
    InputError: If no supported architecture of transformers has these arguments.
  """
  kind = _kind_of(arguments)
  config: dict[str, Any] = {"model_type": kind} | _REQUIRED[kind]
  for argument, key in _ARGUMENTS[kind].items():
    value = arguments[argument]
    wanted = _REQUIRED[kind].get(key, value) if isinstance(key, str) else key
    if value != wanted and not argument.endswith("dropout"):
      raise InputError(
        f"encoder.{argument} is {value}, but a {kind} model has {wanted}; such an encoder cannot be exported to "
        "transformers"
      )
    if isinstance(key, str):
      config[key] = value
  if kind in _DECODERS:
    config |= decoder_config(arguments, kind in _WITH_LOCAL_LAYERS)
    if arguments.get("bidirectional"):
      config |= bidirectional_keys(kind)
  return config


def _read(folder: str | os.PathLike[str]) -> dict[str, Any]:
  path = Path(folder) / "config.json"
  return read_json_object(path, absent="give the folder of a model", damaged="fetch it again")


def _kind_of(arguments: Mapping[str, Any]) -> str:
  """Returns the `model_type` of an encoder."""
  if "num_token_types" in arguments:
    return "bert" if arguments["num_token_types"] else "distilbert"
  switches = {name: arguments[name] for name in ("qkv_bias", "qk_norm", "zero_centered_norm")}
  for kind in _DECODERS:
    if switches == {name: _ARGUMENTS[kind][name] for name in switches}:
      return kind
  raise InputError(
    f"{', '.join(f'encoder.{name}={value}' for name, value in switches.items())}: no supported model of transformers "
    "has these values together; such an encoder cannot be exported to transformers"
  )


def bidirectional_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options of `AutoModel.from_pretrained` that make the attention of a published decoder bidirectional.

  An option does not change the others, so that the halved window of Gemma 3 is one of them.

  Args:
    arguments: Arguments of `models.decoder.Decoder`.
  """
  keys = bidirectional_keys(_kind_of(arguments))
  window = arguments["window"]
  return keys | ({"sliding_window": reach_of(window, causal=False)} if window else {})


def bidirectional_keys(model_type: str) -> dict[str, Any]:
  """Returns the keys of a decoder's `config.json` that make its attention bidirectional.

  transformers reads `is_causal` since version 5.2. Gemma 3 has a key of its own, which also halves `sliding_window`.
  """
  return {"use_bidirectional_attention": True} if model_type in _WITH_LOCAL_LAYERS else {"is_causal": False}
