"""Reads the `config.json` of Hugging Face into the arguments of our encoders."""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

from vixml_jax.errors import InputError

# Argument of models.bert.BertEncoder -> key in config.json; a number stands for itself.
_ARGUMENTS: dict[str, dict[str, str | float]] = {
    "bert": {
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "embed_dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "max_position": "max_position_embeddings",
        "num_token_types": "type_vocab_size",
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
        "num_token_types": 0,
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "projection_dropout": 0.0,
        "layer_norm_eps": 1e-12,
    },
}

# What the encoder does, and the only value of the key that asks for it.
_REQUIRED: dict[str, dict[str, Any]] = {
    "bert": {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
    "distilbert": {"activation": "gelu"},
}

# Keys that configs written before they existed lack, with their meaning then.
_IMPLIED = {"layer_norm_eps": 1e-12, "position_embedding_type": "absolute", "is_decoder": False}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """The contents of `config.json` in a folder."""
  path = pathlib.Path(folder) / "config.json"
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); name a model's folder") from error
  except ValueError as error:
    raise InputError(f"{path}: is not JSON ({error}); fetch it again") from error
  if not isinstance(config, dict):
    raise InputError(f"{path}: is not a JSON object; fetch it again")
  return config


def encoder_arguments(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Arguments with which `models.bert.BertEncoder` is the model in a folder.

  Args:
    folder: holds `config.json`, of `model_type` bert or distilbert.

  Returns:
    All arguments but `dtype`, `remat` and `rngs`.

  Raises:
    InputError: another architecture, a variant that the encoder does not do, or a missing key.
  """
  config = read_config(folder)
  path = pathlib.Path(folder) / "config.json"
  kind = config.get("model_type")
  if kind not in _ARGUMENTS:
    raise InputError(f"{path}: model_type is {kind!r}; known are {', '.join(_ARGUMENTS)}")
  for key, wanted in _REQUIRED[kind].items():
    if _value(config, key, path) != wanted:
      raise InputError(f"{path}: {key} is {config[key]!r}; the encoder only does {wanted!r}")
  return {
      argument: _value(config, key, path) if isinstance(key, str) else key
      for argument, key in _ARGUMENTS[kind].items()
  }


def check_arguments(folder: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
  """Refuses encoder arguments that contradict a folder's `config.json`.

  Args:
    folder: holds `config.json`.
    arguments: arguments of the encoder, any subset; those that the file does not speak of
      (`dtype`, `remat`) and the dropout rates, which do not concern the weights, pass.

  Raises:
    InputError: names the key, both values and what to set.
  """
  theirs = encoder_arguments(folder)
  path = pathlib.Path(folder) / "config.json"
  for argument, value in arguments.items():
    if argument.endswith("dropout") or argument not in theirs:
      continue
    if theirs[argument] != value:
      raise InputError(
          f"{path}: the weights have {argument}={theirs[argument]}, but encoder.{argument} is"
          f" {value}; set it to {theirs[argument]} or choose other weights"
      )


def _value(config: Mapping[str, Any], key: str, path: pathlib.Path) -> Any:
  if key in config:
    return config[key]
  if key in _IMPLIED:
    return _IMPLIED[key]
  raise InputError(f"{path}: has no key {key}; add it or fetch the file again")
