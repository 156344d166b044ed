"""Converts the `config.json` of Hugging Face to the arguments of our encoders, and back."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.files import read_json_object

# Qwen2, Qwen3 and Llama differ in two switches. Arguments that depend on several keys are in `_derived_arguments`.
_DECODER: dict[str, str | float] = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "embed_dim": "hidden_size",
  "num_heads": "num_attention_heads",
  "mlp_dim": "intermediate_size",
  "norm_eps": "rms_norm_eps",
  "qkv_bias": False,
  "qk_norm": False,
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
  "qwen2": _DECODER | {"qkv_bias": True},
  "qwen3": _DECODER | {"qk_norm": True, "head_dim": "head_dim"},  # Its head_dim does not follow from other keys.
  "llama": _DECODER,
}
_DECODERS = ("qwen2", "qwen3", "llama")
MAX_SIZE = 2**24
"""Largest size that a config may have. The largest vocabularies have 2^18 tokens, and memory follows from sizes."""

# Arguments that are no sizes: the least value, and the first that is too large.
_SHARES = ("dropout", "attention_dropout", "projection_dropout")
_POSITIVE = ("norm_eps", "layer_norm_eps", "rope_theta")
_MAY_BE_ZERO = ("num_token_types",)
_SWITCHES = ("qkv_bias", "qk_norm", "rope_scaling")

# Key -> the only value that the encoder supports.
_REQUIRED: dict[str, dict[str, Any]] = {
  "bert": {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
  "distilbert": {"activation": "gelu"},
  "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
  "qwen3": {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
  "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}

# Values of keys that older configs do not have.
_IMPLIED = {
  "layer_norm_eps": 1e-12,
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "use_sliding_window": False,
  "attention_bias": False,
  "mlp_bias": False,
}

# Keys of Llama 3's rotary positions, in the order of the decoder's `rope_scaling`.
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads `config.json` in a folder.

  Raises:
    InputError: If the file cannot be read or is not a JSON object.
  """
  path = Path(folder) / "config.json"
  return read_json_object(path, absent="give the folder of a model", damaged="fetch it again")


def encoder_arguments(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the arguments with which our encoder is the model in a folder.

  Args:
    folder: Folder with a `config.json` of `model_type` bert or distilbert (for `models.bert.BertEncoder`), or qwen2,
      qwen3 or llama (for `models.decoder.Decoder`).

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
  for key, wanted in _REQUIRED[kind].items():
    if _value(config, key, path) != wanted:
      raise InputError(
        f"{path}: {key} is {config[key]!r:.60}; the encoder supports only {wanted!r}: choose another model"
      )
  arguments = {
    argument: _value(config, key, path) if isinstance(key, str) else key for argument, key in _ARGUMENTS[kind].items()
  }
  names = {argument: key for argument, key in _ARGUMENTS[kind].items() if isinstance(key, str)}
  check_numbers(path, arguments, names)
  if kind not in _DECODERS:
    return arguments
  derived = _derived_arguments(config, path)
  check_numbers(path, derived, {"num_kv_heads": "num_key_value_heads"})
  return arguments | derived


def is_size(value: Any) -> bool:
  """Returns whether a value is a whole number from 1 to `MAX_SIZE`."""
  return type(value) is int and 1 <= value <= MAX_SIZE


def check_numbers(path: Path, arguments: Mapping[str, Any], names: Mapping[str, str]) -> None:
  """Checks the types and ranges of the arguments of an encoder that were read from a config.

  Args:
    path: Path of the config.
    arguments: Arguments by name.
    names: Key of an argument in the config; that of an argument without one is its name.

  Raises:
    InputError: A value is wrong; the message names the key.
  """
  for argument, value in arguments.items():
    if argument in _SHARES:
      is_right, wanted = _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"
    elif argument in _POSITIVE:
      is_right, wanted = _is_number(value) and 0 < value < 1e12, "a positive number"
    elif argument in _MAY_BE_ZERO:
      is_right, wanted = (value == 0 and type(value) is int) or is_size(value), f"a whole number up to {MAX_SIZE:,}"
    elif argument in _SWITCHES:
      continue
    else:
      is_right, wanted = is_size(value), f"a positive integer of at most {MAX_SIZE:,}"
    if not is_right:
      raise InputError(
        f"{path}: {names.get(argument, argument)} is {value!r:.40}; it must be {wanted}: fetch the file again"
      )


def _is_number(value: Any) -> bool:
  return type(value) in (int, float)


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
      adapters are ignored. For a bidirectional decoder the config has `is_causal` false, which transformers supports
      since 5.2.

  Raises:
    InputError: If no supported architecture of transformers has these arguments.
  """
  kind = _kind_of(arguments)
  config: dict[str, Any] = {"model_type": kind} | _REQUIRED[kind]
  for argument, key in _ARGUMENTS[kind].items():
    if isinstance(key, str):
      config[key] = arguments[argument]
    elif not argument.endswith("dropout") and arguments[argument] != key:
      raise InputError(
        f"encoder.{argument} is {arguments[argument]}, but a {kind} model has {key}; such an encoder cannot be"
        " exported to transformers"
      )
  if kind in _DECODERS:
    config |= {
      "num_key_value_heads": arguments["num_kv_heads"],
      "head_dim": arguments["head_dim"],
      "rope_theta": arguments["rope_theta"],
      "tie_word_embeddings": True,
    }
    if arguments["rope_scaling"]:
      config["rope_scaling"] = {"rope_type": "llama3"} | dict(zip(_LLAMA3_KEYS, arguments["rope_scaling"], strict=True))
    if arguments.get("bidirectional"):
      config["is_causal"] = False
  return config


def _kind_of(arguments: Mapping[str, Any]) -> str:
  """Returns the `model_type` of an encoder."""
  if "num_token_types" in arguments:
    return "bert" if arguments["num_token_types"] else "distilbert"
  switches = arguments["qkv_bias"], arguments["qk_norm"]
  for kind in _DECODERS:
    if switches == (_ARGUMENTS[kind]["qkv_bias"], _ARGUMENTS[kind]["qk_norm"]):
      return kind
  raise InputError(
    "encoder.qkv_bias and encoder.qk_norm are both True, which no supported model of transformers has; such an"
    " encoder cannot be exported to transformers"
  )


def _derived_arguments(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
  """Returns the arguments of a decoder that depend on several keys, or on the absence of a key."""
  layer_types = config.get("layer_types")
  if layer_types is not None and not isinstance(layer_types, list):
    raise InputError(f"{path}: layer_types is {layer_types!r:.60}; it must be a list: fetch the file again")
  kinds = {str(kind) for kind in layer_types or []} - {"full_attention"}
  if kinds:
    raise InputError(
      f"{path}: layer_types has {', '.join(sorted(kinds)):.200}; the encoder supports only full_attention: choose "
      "another model"
    )
  num_heads, embed_dim = (_value(config, key, path) for key in ("num_attention_heads", "hidden_size"))
  head_dim = config.get("head_dim")
  if head_dim is None:
    head_dim, rest = divmod(embed_dim, num_heads)
    if rest:
      raise InputError(
        f"{path}: hidden_size {embed_dim} is not divisible by num_attention_heads {num_heads}; add head_dim"
      )
  num_kv_heads = config.get("num_key_value_heads")
  return {
    "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
    "head_dim": head_dim,
    **_rotary_arguments(config, path),
  }


def _rotary_arguments(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
  """Returns `rope_theta` and `rope_scaling` from a config of transformers 5 or of an older version."""
  key = "rope_scaling" if config.get("rope_parameters") in (None, {}) else "rope_parameters"
  rope = {} if config.get(key) is None else config[key]
  if not isinstance(rope, dict):
    raise InputError(f"{path}: {key} is {rope!r:.60}; it must be an object: fetch the file again")
  theta = rope["rope_theta"] if "rope_theta" in rope else _value(config, "rope_theta", path)
  check_numbers(path, {"rope_theta": theta}, {})
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise InputError(
      f"{path}: {key} is of type {kind!r:.60}; the encoder supports only 'default' and 'llama3': choose another model"
    )
  fraction = rope.get("partial_rotary_factor", 1.0)
  if fraction != 1.0:
    raise InputError(
      f"{path}: {key} has partial_rotary_factor={fraction!r:.40}; the encoder supports only 1.0: choose another model"
    )
  if kind == "default":
    return {"rope_theta": float(theta), "rope_scaling": None}
  missing = [name for name in _LLAMA3_KEYS if name not in rope]
  if missing:
    raise InputError(f"{path}: {key} has no {', '.join(missing)}; fetch the file again")
  for name in _LLAMA3_KEYS:
    if not _is_number(rope[name]) or not 0 < rope[name] <= MAX_SIZE:
      raise InputError(
        f"{path}: {name} of {key} is {rope[name]!r:.40}; it must be a positive number: fetch the file again"
      )
  *factors, original_max_position = (rope[name] for name in _LLAMA3_KEYS)
  return {"rope_theta": float(theta), "rope_scaling": (*map(float, factors), int(original_max_position))}


def _value(config: Mapping[str, Any], key: str, path: Path) -> Any:
  if key in config:
    return config[key]
  if key in _IMPLIED:
    return _IMPLIED[key]
  raise InputError(f"{path}: has no key {key}; add it or fetch the file again")
