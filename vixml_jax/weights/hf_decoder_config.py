"""Converts the keys of a decoder's `config.json` that depend on each other: heads, types of layers, rotation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.weights.hf_values import MAX_SIZE, check_numbers, is_number, is_size, value_of

# Keys of the scaled rotary positions, in the order of the decoder's `rope_scaling`.
_SCALING_KEYS = {
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def decoder_arguments(config: Mapping[str, Any], path: Path, local_layers: bool) -> dict[str, Any]:
  """Returns the arguments of a decoder that depend on several keys, or on the absence of a key.

  Args:
    config: Contents of the file.
    path: Path of the file, for messages.
    local_layers: Whether the family has local layers, as Gemma 3.

  Raises:
    InputError: A key is missing or has a value that the decoder does not support.
  """
  num_heads, embed_dim = (value_of(config, key, path) for key in ("num_attention_heads", "hidden_size"))
  head_dim = config.get("head_dim")
  if head_dim is None:
    head_dim, rest = divmod(embed_dim, num_heads)
    if rest:
      raise InputError(
        f"{path}: hidden_size {embed_dim} is not divisible by num_attention_heads {num_heads}; add head_dim"
      )
  num_kv_heads = config.get("num_key_value_heads")
  found = {"num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads, "head_dim": head_dim}
  check_numbers(path, found, {"num_kv_heads": "num_key_value_heads"})
  return found | (_local_arguments(config, path, head_dim) if local_layers else _global_arguments(config, path))


def decoder_config(arguments: Mapping[str, Any], local_layers: bool) -> dict[str, Any]:
  """Returns the keys of a `config.json` for arguments of a decoder; `decoder_arguments` is the inverse.

  The keys of rotary positions are those of transformers 4, which later versions convert.
  """
  config: dict[str, Any] = {
    "num_key_value_heads": arguments["num_kv_heads"],
    "head_dim": arguments["head_dim"],
    "rope_theta": arguments["rope_theta"],
    "tie_word_embeddings": True,
  }
  if scaling := arguments["rope_scaling"]:
    kind, keys = next((kind, keys) for kind, keys in _SCALING_KEYS.items() if len(keys) == len(scaling))
    config["rope_scaling"] = {"rope_type": kind} | dict(zip(keys, scaling, strict=True))
  if local_layers:
    config |= {
      "query_pre_attn_scalar": arguments["attention_scalar"] or arguments["head_dim"],
      "rope_local_base_freq": arguments["local_rope_theta"],
      "layer_types": _layer_types(arguments["global_every"], arguments["num_layers"]),
    }
    if arguments["window"]:
      config["sliding_window"] = arguments["window"]
  return config


def _global_arguments(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
  """Returns `rope_theta` and `rope_scaling` of a decoder all of whose layers are global."""
  kinds = {str(kind) for kind in _list_of_layers(config, path)} - {_GLOBAL}
  if kinds:
    raise InputError(
      f"{path}: layer_types has {', '.join(sorted(kinds)):.200}; the encoder supports only full_attention: choose "
      "another model"
    )
  return _rotary_arguments(config, path, *_rope_of(config, path), "rope_theta")


def _local_arguments(config: Mapping[str, Any], path: Path, head_dim: Any) -> dict[str, Any]:
  """Returns the arguments of a decoder with local layers."""
  key, rope = _rope_of(config, path)
  whole: dict[str, Any] = rope
  local: dict[str, Any] = {}
  if key == "rope_parameters":  # That of each type of layers.
    whole, local = ({} if rope.get(kind) is None else rope[kind] for kind in (_GLOBAL, _LOCAL))
    for found in (whole, local):
      if not isinstance(found, dict):
        raise InputError(f"{path}: {key} has {found!r:.60}; it must have objects: fetch the file again")
  of_local = _rotary_arguments(config, path, key, local, "rope_local_base_freq")
  if of_local["rope_scaling"]:
    raise InputError(
      f"{path}: {key} of {_LOCAL} is scaled; the encoder supports only 'default' there: choose another model"
    )
  every, scalar = _global_every(config, path), _size(config, "query_pre_attn_scalar", path)
  return {
    **_rotary_arguments(config, path, key, whole, "rope_theta"),
    "local_rope_theta": of_local["rope_theta"],
    "global_every": every,
    "window": _size(config, "sliding_window", path) if every > 1 else 0,
    "attention_scalar": 0 if scalar == head_dim else scalar,
  }


def _global_every(config: Mapping[str, Any], path: Path) -> int:
  """Returns n if every n-th layer is global."""
  num_layers = _size(config, "num_hidden_layers", path)
  stated = next((key for key in ("sliding_window_pattern", "_sliding_window_pattern") if key in config), None)
  every = _size(config, stated, path) if stated else 6
  types = _list_of_layers(config, path)
  if not types or types == _layer_types(every, min(num_layers, len(types) + 1)):
    return every
  every = types.index(_GLOBAL) + 1 if _GLOBAL in types else len(types) + 1
  if types != _layer_types(every, min(num_layers, len(types) + 1)):
    raise InputError(
      f"{path}: layer_types are not those of num_hidden_layers={num_layers} layers of which every n-th has"
      f" {_GLOBAL} and the others {_LOCAL}: choose another model"
    )
  return every


def _size(config: Mapping[str, Any], key: str, path: Path) -> int:
  """Returns the value of a key, which must be a positive integer."""
  value = value_of(config, key, path)
  if not is_size(value):
    raise InputError(f"{path}: {key} is {value!r:.40}; it must be a positive integer: fetch the file again")
  return int(value)


def _layer_types(every: int, num_layers: int) -> list[str]:
  """Returns the types of layers of which every n-th is global."""
  return [_LOCAL if layer % every else _GLOBAL for layer in range(1, num_layers + 1)]


def _list_of_layers(config: Mapping[str, Any], path: Path) -> list[Any]:
  layer_types = config.get("layer_types")
  if layer_types is not None and not isinstance(layer_types, list):
    raise InputError(f"{path}: layer_types is {layer_types!r:.60}; it must be a list: fetch the file again")
  return layer_types or []


def _rope_of(config: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
  """Returns the key of the rotary positions in a config of transformers 5 or of an older version, and its value."""
  key = "rope_scaling" if config.get("rope_parameters") in (None, {}) else "rope_parameters"
  rope = {} if config.get(key) is None else config[key]
  if not isinstance(rope, dict):
    raise InputError(f"{path}: {key} is {rope!r:.60}; it must be an object: fetch the file again")
  return key, rope


def _rotary_arguments(
  config: Mapping[str, Any], path: Path, key: str, rope: Mapping[str, Any], theta_key: str
) -> dict[str, Any]:
  """Returns `rope_theta` and `rope_scaling`.

  Args:
    config: Contents of the file.
    path: Path of the file, for messages.
    key: Key of `rope`.
    rope: The rotary positions; without a base in configs of transformers 4.
    theta_key: Key of their base in configs of transformers 4.
  """
  theta = rope["rope_theta"] if "rope_theta" in rope else value_of(config, theta_key, path)
  check_numbers(path, {"rope_theta": theta}, {"rope_theta": theta_key})
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default" and (not isinstance(kind, str) or kind not in _SCALING_KEYS):
    raise InputError(
      f"{path}: {key} is of type {kind!r:.60}; the encoder supports only 'default', 'linear' and 'llama3': choose "
      "another model"
    )
  fraction = rope.get("partial_rotary_factor", 1.0)
  if fraction != 1.0:
    raise InputError(
      f"{path}: {key} has partial_rotary_factor={fraction!r:.40}; the encoder supports only 1.0: choose another model"
    )
  if kind == "default":
    return {"rope_theta": float(theta), "rope_scaling": None}
  names = _SCALING_KEYS[kind]
  missing = [name for name in names if name not in rope]
  if missing:
    raise InputError(f"{path}: {key} has no {', '.join(missing)}; fetch the file again")
  for name in names:
    if not is_number(rope[name]) or not 0 < rope[name] <= MAX_SIZE:
      raise InputError(
        f"{path}: {name} of {key} is {rope[name]!r:.40}; it must be a positive number: fetch the file again"
      )
  scaling = tuple((int if name.startswith("original") else float)(rope[name]) for name in names)
  return {"rope_theta": float(theta), "rope_scaling": scaling}
