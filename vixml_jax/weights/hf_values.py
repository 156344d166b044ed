"""Reads values of the `config.json` of Hugging Face and checks their types and ranges."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vixml_jax.errors import InputError

MAX_SIZE = 2**24
"""Largest size that a config may have. The largest vocabularies have 2^18 tokens, and memory follows from sizes."""

# Arguments that are no sizes: the least value, and the first that is too large.
_SHARES = ("dropout", "attention_dropout", "projection_dropout")
_POSITIVE = ("norm_eps", "layer_norm_eps", "rope_theta", "local_rope_theta")
_MAY_BE_ZERO = ("num_token_types", "attention_scalar", "window")
_SWITCHES = (
  "qkv_bias",
  "qk_norm",
  "zero_centered_norm",
  "output_norm",
  "activation",
  "scale_embedding",
  "rope_scaling",
)

# Values of keys that older configs do not have.
_IMPLIED = {
  "layer_norm_eps": 1e-12,
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "use_sliding_window": False,
  "attention_bias": False,
  "mlp_bias": False,
  "attn_logit_softcapping": None,
}


def value_of(config: Mapping[str, Any], key: str, path: Path) -> Any:
  """Returns the value of a key of a config, or the one that it had before the key existed.

  Raises:
    InputError: The key is missing.
  """
  if key in config:
    return config[key]
  if key in _IMPLIED:
    return _IMPLIED[key]
  raise InputError(f"{path}: has no key {key}; add it or fetch the file again")


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
      is_right, wanted = is_number(value) and 0 <= value < 1, "a number from 0 to below 1"
    elif argument in _POSITIVE:
      is_right, wanted = is_number(value) and 0 < value < 1e12, "a positive number"
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


def is_number(value: Any) -> bool:
  """Returns whether a value is a number and no boolean."""
  return type(value) in (int, float)
