"""Converts the `config.json` of vision towers of Hugging Face to the arguments of our vision transformer."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.weights import hf_config, hf_values, tables
from vixml_jax.weights.positions import resize_bicubic, resize_bilinear

_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of vision towers.

  Attributes:
    name: Its name, for messages.
    keys: Argument of `models.vision.VisionTransformer` -> key of the config, and the value of an absent key, because
      transformers does not write values that equal its defaults.
    required: Key -> the only value that the tower supports, which is also the value of an absent key.
    derive: Returns the arguments that have no key of their own, for the config, its path and the names of the tensors.
    table: Returns the table of the weights for the arguments.
    resize_positions: Resizes position embeddings [old grid squared, D] to another grid.
    has_processor: Whether images are prepared as `preprocessor_config.json` says. Otherwise the towers of the family
      are prepared alike, in one of several ways.
  """

  name: str
  keys: Mapping[str, tuple[str, int | float]]
  required: Mapping[str, Any]
  derive: Callable[[Mapping[str, Any], Path, Collection[str]], dict[str, Any]]
  table: Callable[[Mapping[str, Any]], tables.Table]
  resize_positions: Callable[[np.ndarray, int], np.ndarray]
  has_processor: bool = True


def _clip_options(settings: Mapping[str, Any], path: Path, names: Collection[str]) -> dict[str, Any]:
  options: dict[str, Any] = {"activation": _activation(settings, path, "quick_gelu")}
  options |= {"patch_bias": False, "class_token": True, "embedding_norm": True}  # nosec B105 - a token of an image.
  if tables.PROJECTION in names:
    options["projection_dim"] = settings.get("projection_dim", 512)
    hf_values.check_numbers(path, {"projection_dim": options["projection_dim"]}, {})
  return options


def _dinov2_options(settings: Mapping[str, Any], path: Path, names: Collection[str]) -> dict[str, Any]:
  ratio, gated = settings.get("mlp_ratio", 4), settings.get("use_swiglu_ffn", False)
  if type(gated) is not bool:
    raise InputError(f"{path}: use_swiglu_ffn is {gated!r:.40}; it must be true or false: fetch the file again")
  if type(ratio) not in (int, float) or not 0 < ratio <= 1_000:
    raise InputError(f"{path}: mlp_ratio is {ratio!r:.40}; it must be a positive number: fetch the file again")
  mlp_dim = int(settings.get("hidden_size", 768) * ratio)
  if gated:  # `Dinov2SwiGLUFFN`: two thirds, rounded up to a multiple of 8.
    mlp_dim = (int(mlp_dim * 2 / 3) + 7) // 8 * 8
  return {
    "mlp_dim": mlp_dim,
    "activation": "silu" if gated else _activation(settings, path, "gelu"),
    "gated": gated,
    "layer_scale": True,
    "class_token": True,  # nosec B105 - a token of an image.
  }


def _activation(settings: Mapping[str, Any], path: Path, implied: str) -> str:
  name = settings.get("hidden_act", implied)
  if not isinstance(name, str) or name not in _ACTIVATIONS:
    raise InputError(
      f"{path}: hidden_act is {name!r:.60}; the tower supports only {', '.join(_ACTIVATIONS)}: choose another model"
    )
  return _ACTIVATIONS[name]


_SIZES = {
  "image_size": ("image_size", 224),
  "patch_size": ("patch_size", 16),
  "num_layers": ("num_hidden_layers", 12),
  "embed_dim": ("hidden_size", 768),
  "num_heads": ("num_attention_heads", 12),
  "layer_norm_eps": ("layer_norm_eps", 1e-6),
}

SIGLIP = Family(
  name="SigLIP",
  keys=_SIZES | {"mlp_dim": ("intermediate_size", 3072)},
  required={"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "vision_use_head": True},
  derive=lambda settings, path, names: {},
  table=lambda arguments: tables.SIGLIP,
  resize_positions=resize_bilinear,
  has_processor=False,
)

_CLIP = Family(
  name="CLIP",
  keys=_SIZES
  | {
    "mlp_dim": ("intermediate_size", 3072),
    "patch_size": ("patch_size", 32),
    "layer_norm_eps": ("layer_norm_eps", 1e-5),
  },
  required={"num_channels": 3},
  derive=_clip_options,
  table=lambda arguments: tables.clip("projection_dim" in arguments),
  resize_positions=resize_bicubic,
)

_DINOV2 = Family(
  name="DINOv2",
  keys=_SIZES | {"patch_size": ("patch_size", 14)},
  required={"num_channels": 3, "qkv_bias": True},
  derive=_dinov2_options,
  table=lambda arguments: tables.dinov2("num_registers" in arguments, arguments["gated"]),
  resize_positions=resize_bicubic,
)

_DINOV2_WITH_REGISTERS = dataclasses.replace(
  _DINOV2,
  keys=_SIZES | {"num_registers": ("num_register_tokens", 4)},
  resize_positions=lambda positions, grid: resize_bicubic(positions, grid, antialias=True),
)

# `model_type` -> family, and the part of the config with the tower; "" for the config itself.
_MODEL_TYPES = {
  "siglip": (SIGLIP, "vision_config"),
  "siglip_vision_model": (SIGLIP, ""),
  "clip": (_CLIP, "vision_config"),
  "clip_vision_model": (_CLIP, ""),
  "dinov2": (_DINOV2, ""),
  "dinov2_with_registers": (_DINOV2_WITH_REGISTERS, ""),
}


def family_of(folder: Path) -> Family:
  """Returns the family of the tower in a Hugging Face folder.

  Raises:
    InputError: If `config.json` cannot be read, or the model is of another family.
  """
  return _read(folder)[0]


def read_tower(folder: Path, names: Collection[str]) -> tuple[Family, dict[str, Any]]:
  """Returns the family of the tower in a Hugging Face folder, and its arguments.

  Args:
    folder: Folder with `config.json`.
    names: Names of the tensors. CLIP is published with and without a projection, which the config does not say.

  Returns:
    The family, and the arguments of `models.vision.VisionTransformer`, except dtype, remat and rngs.

  Raises:
    InputError: If the architecture or one of its variants is not supported, or a value is wrong.
  """
  family, settings = _read(folder)
  path = folder / "config.json"
  for key, wanted in family.required.items():
    if settings.get(key, wanted) != wanted:
      raise InputError(
        f"{path}: {key} is {settings[key]!r:.60}; the tower supports only {wanted!r}: choose another model"
      )
  arguments = {argument: settings.get(key, implied) for argument, (key, implied) in family.keys.items()}
  keys = {argument: key for argument, (key, _) in family.keys.items()}
  hf_values.check_numbers(path, arguments, keys)
  return family, arguments | family.derive(settings, path, names)


def _read(folder: Path) -> tuple[Family, dict[str, Any]]:
  """Returns the family, and the settings of the tower."""
  config = hf_config.read_config(folder)
  path = folder / "config.json"
  kind = config.get("model_type")
  if not isinstance(kind, str) or kind not in _MODEL_TYPES:
    raise InputError(
      f"{path}: model_type is {kind!r:.60}; it must be one of {', '.join(_MODEL_TYPES)} (the fixed resolutions of "
      "SigLIP 2 are siglip; NaFlex is not supported)"
    )
  family, section = _MODEL_TYPES[kind]
  if not section:
    return family, config
  # transformers lets the section with the old name decide, where a config has both.
  section = next((name for name in (f"{section}_dict", section) if config.get(name) is not None), section)
  settings = config.get(section, {})
  if not isinstance(settings, dict):
    raise InputError(f"{path}: {section} is {settings!r:.60}; it must be an object: fetch the file again")
  # The whole model has the size of its projection outside of the section.
  return family, settings | {"projection_dim": config.get("projection_dim", 512)}
