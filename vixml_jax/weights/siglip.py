"""Published SigLIP and SigLIP 2 vision towers by name; reads and writes them as big_vision and Hugging Face do."""

from collections.abc import Mapping
import math
import os
from pathlib import Path
import re
from typing import Any

import numpy as np
import scipy.ndimage

from vixml_jax.errors import InputError
from vixml_jax.models.siglip import define_siglip
from vixml_jax.weights import engine, hf_config, hf_folder, source, tables
from vixml_jax.weights.npz import NpzFile, write_npz

# Of each size: its name on the hub, and the tower's depth, width, heads and feed-forward width.
_SIZES: dict[str, tuple[str, dict[str, int]]] = {
  "b": ("base", {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "mlp_dim": 3072}),
  "l": ("large", {"num_layers": 24, "embed_dim": 1024, "num_heads": 16, "mlp_dim": 4096}),
  "so400m": ("so400m", {"num_layers": 27, "embed_dim": 1152, "num_heads": 16, "mlp_dim": 4304}),
  "g-opt": ("giant-opt", {"num_layers": 40, "embed_dim": 1536, "num_heads": 16, "mlp_dim": 6144}),
}

# Name of a variant, as big_vision has it -> name on the hub. SigLIP 2 without its NaFlex variants,
# which have no fixed resolution, and the English SigLIP.
VARIANTS: dict[str, str] = {
  f"{family}_{size}{patch}_{pixels}": f"google/{family}-{_SIZES[size][0]}-patch{patch}-{pixels}"
  for family, size, patch, resolutions in (
    ("siglip2", "b", 32, (256,)),
    ("siglip2", "b", 16, (224, 256, 384, 512)),
    ("siglip2", "l", 16, (256, 384, 512)),
    ("siglip2", "so400m", 14, (224, 384)),
    ("siglip2", "so400m", 16, (256, 384, 512)),
    ("siglip2", "g-opt", 16, (256, 384)),
    ("siglip", "b", 16, (224, 256, 384, 512)),
    ("siglip", "l", 16, (256, 384)),
    ("siglip", "so400m", 14, (224, 384)),
  )
  for pixels in resolutions
}

# Argument of models.siglip.SiglipVision -> key of the vision config on the hub, and what a config
# means that lacks the key: transformers leaves out what equals its defaults.
_CONFIG_KEYS: dict[str, tuple[str, int | float]] = {
  "image_size": ("image_size", 224),
  "patch_size": ("patch_size", 16),
  "num_layers": ("num_hidden_layers", 12),
  "embed_dim": ("hidden_size", 768),
  "num_heads": ("num_attention_heads", 12),
  "mlp_dim": ("intermediate_size", 3072),
  "layer_norm_eps": ("layer_norm_eps", 1e-6),
}

# Keys of which the tower only does one value, which is also what their absence means.
_REQUIRED: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "vision_use_head": True}

_MODEL_TYPES = ("siglip", "siglip_vision_model")
_QUERY = "MultiHeadDotProductAttention_0/query/kernel"


def siglip_arguments(variant: str) -> dict[str, Any]:
  """Arguments with which `models.siglip.SiglipVision` is a published tower.

  Args:
    variant: one of `VARIANTS`, such as siglip2_so400m14_384.

  Returns:
    image_size, patch_size, num_layers, embed_dim, num_heads, mlp_dim.

  Raises:
    InputError: there is no such variant.
  """
  found = re.fullmatch(r"siglip2?_(.*?)(\d\d)_(\d+)", variant)
  if found is None or variant not in VARIANTS:
    raise InputError(f"variant {variant!r} is not known; known are {', '.join(VARIANTS)}")
  size, patch, pixels = found.groups()
  return {"image_size": int(pixels), "patch_size": int(patch), **_SIZES[size][1]}


def load_siglip(
  path: str | os.PathLike[str], *, variant: str | None = None, image_size: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a vision tower.

  Args:
    path: an `.npz` file of big_vision, of the image tower or of both; a Hugging Face folder of a
      SiglipModel or SiglipVisionModel; a name on the hub; or one of `VARIANTS`, fetched from there.
    variant: one of `VARIANTS`, which the checkpoint then has to be.
    image_size: in pixels; where its grid of patches is not the checkpoint's, the position
      embeddings are resized to it. The checkpoint's own if None.

  Returns:
    `(params, arguments)`: nested dict of f32 numpy arrays, and the arguments of
    `models.siglip.SiglipVision` besides dtype, remat and rngs.

  Raises:
    InputError: no such file, a damaged one, another architecture or variant, or weights that do
      not fit exactly.
  """
  path = find_checkpoint(path)
  checkpoint: engine.TensorSource
  if path.is_dir():
    arguments, table, checkpoint = _folder_arguments(path), tables.SIGLIP, hf_folder.SafetensorsFolder(path)
  else:
    checkpoint = NpzFile(path)
    arguments, table = _npz_arguments(checkpoint)
  _check_sizes(checkpoint.name, arguments)
  if variant is not None:
    _check_variant(checkpoint.name, variant, arguments)
  _, shapes, _ = define_siglip(arguments)
  params = engine.apply(table, checkpoint, shapes)
  if image_size is None:
    return params, arguments
  arguments = arguments | {"image_size": image_size}
  _check_sizes("image_size", arguments)
  grid = image_size // arguments["patch_size"]
  return params | {"position_embedding": resize_positions(params["position_embedding"], grid)}, arguments


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
  """The `.npz` file or local folder that `load_siglip` reads for a path, fetched first if on the hub."""
  if str(path).endswith(".npz"):
    if not os.path.isfile(path):
      raise InputError(f"{path}: no such file; name an npz file of big_vision or a Hugging Face folder")
    return Path(path)
  return source.resolve(VARIANTS.get(str(path), str(path)))


def checkpoint_hashes(path: str | os.PathLike[str]) -> dict[str, str]:
  """sha256 of each file of weights that `load_siglip` reads for a path, by file name."""
  path = find_checkpoint(path)
  return source.weight_hashes(path) if path.is_dir() else {path.name: source.file_hash(path)}


def save_npz(
  params: Mapping[str, Any],
  path: str | os.PathLike[str],
  *,
  stacked: bool = True,
  prefix: str = "params/img/",
  dtype: str | None = None,
) -> None:
  """Writes a tower as big_vision does.

  Args:
    params: as `load_siglip` returns them; f32, f16 or bf16.
    path: the file.
    stacked: the layers stand in one tensor `encoderblock/...`, not in one each, `encoderblock_0/...`.
    prefix: before every name; as published, `params/img/`.
    dtype: of the tensors in the file: float32, float16, bfloat16 or, if None, the parameters' own.

  Raises:
    InputError: the parameters are not those of a tower.
  """
  table = tables.BIG_VISION_STACKED if stacked else tables.BIG_VISION_UNSTACKED
  tensors = engine.invert(table, params)
  write_npz(
    {prefix + name: tensor if dtype is None else tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()},
    path,
  )


def save_siglip(params: Mapping[str, Any], folder: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
  """Writes a tower as a folder that `transformers.SiglipVisionModel` loads.

  Args:
    params: as `load_siglip` returns them.
    folder: made if it does not exist.
    arguments: of the tower, as `load_siglip` returns them.

  Raises:
    InputError: the parameters are not those of a tower.
  """
  settings = {key: arguments.get(argument, implied) for argument, (key, implied) in _CONFIG_KEYS.items()}
  hf_folder.save_pretrained(
    params,
    folder,
    {"architectures": ["SiglipVisionModel"], "model_type": tables.SIGLIP.name, **settings, **_REQUIRED},
    tables.SIGLIP,
  )


def resize_positions(positions: np.ndarray, grid: int) -> np.ndarray:
  """Position embeddings for another grid of patches, bilinear between those of the old one.

  The corners stay where they are. Same as big_vision's `resample_posemb` (models/vit.py), which
  calls the same function of scipy.

  Args:
    positions: [old grid squared, D].
    grid: patches in a row and in a column.

  Returns:
    [grid squared, D].
  """
  old = math.isqrt(len(positions))
  if grid == old:
    return positions
  zoomed = scipy.ndimage.zoom(positions.reshape(old, old, -1), (grid / old, grid / old, 1), order=1)
  return zoomed.reshape(grid**2, -1)


def _folder_arguments(folder: Path) -> dict[str, Any]:
  """Arguments of the tower that a Hugging Face folder's `config.json` describes."""
  settings = hf_config.read_config(folder)
  path = folder / "config.json"
  if settings.get("model_type") not in _MODEL_TYPES:
    raise InputError(
      f"{path}: model_type is {settings.get('model_type')!r}; known are {', '.join(_MODEL_TYPES)} (SigLIP"
      " 2 of a fixed resolution is a siglip; NaFlex is not read)"
    )
  settings = settings.get("vision_config", {}) if settings["model_type"] == "siglip" else settings
  for key, wanted in _REQUIRED.items():
    if settings.get(key, wanted) != wanted:
      raise InputError(f"{path}: {key} is {settings[key]!r}; the tower only does {wanted!r}")
  return {argument: settings.get(key, implied) for argument, (key, implied) in _CONFIG_KEYS.items()}


def _npz_arguments(checkpoint: engine.TensorSource) -> tuple[dict[str, Any], tables.Table]:
  """Arguments of the tower in a file, from its shapes, and the table of its way to keep layers."""
  originals, _ = engine.original_names(tables.BIG_VISION_STACKED, checkpoint)
  numbers = [int(found[1]) for name in originals if (found := re.match(r"Transformer/encoderblock_(\d+)/", name))]

  def shape(name: str, dimensions: int) -> tuple[int, ...]:
    found = checkpoint.shape(originals[name]) if name in originals else None
    if found is None or len(found) != dimensions:
      what = "has no tensor" if found is None else f"has a tensor of shape {list(found)} for"
      raise InputError(f"{checkpoint.name}: {what} {name}; name a file with a SigLIP image tower of big_vision")
    return found

  patch, _, _, embed_dim = shape("embedding/kernel", 4)
  positions = shape("pos_embedding", 3)[1]
  _, num_heads, _ = shape(f"MAPHead_0/{_QUERY}", 3)
  _, mlp_dim = shape("MAPHead_0/MlpBlock_0/Dense_0/kernel", 2)
  num_layers = max(numbers) + 1 if numbers else shape(f"Transformer/encoderblock/{_QUERY}", 4)[0]
  grid = math.isqrt(positions)
  if grid**2 != positions:
    raise InputError(
      f"{checkpoint.name}: {positions} positions make no square of patches; the file has a class"
      " token or images that are not square, which SigLIP has not"
    )
  arguments = {
    "patch_size": patch,
    "num_layers": num_layers,
    "embed_dim": embed_dim,
    "num_heads": num_heads,
    "mlp_dim": mlp_dim,
  }
  table = tables.BIG_VISION_UNSTACKED if numbers else tables.BIG_VISION_STACKED
  return {"image_size": _image_size(arguments, grid), **arguments}, table


def _image_size(arguments: Mapping[str, int], grid: int) -> int:
  """Pixels of the images that a tower was trained on, which its file only tells up to a patch."""
  for variant in VARIANTS:
    published = siglip_arguments(variant)
    if arguments.items() <= published.items() and published["image_size"] // published["patch_size"] == grid:
      return published["image_size"]
  return grid * arguments["patch_size"]


def _check_sizes(name: str, arguments: Mapping[str, Any]) -> None:
  """Refuses sizes that make no tower, which come from a file and not from us."""
  sizes = {key: value for key, value in arguments.items() if key != "layer_norm_eps"}
  wrong = [f"{key} {value!r}" for key, value in sizes.items() if type(value) is not int or value < 1]
  if wrong:
    raise InputError(f"{name}: has {', '.join(wrong)}; a positive integer is wanted")
  if sizes["embed_dim"] % sizes["num_heads"]:
    raise InputError(f"{name}: a width of {sizes['embed_dim']} does not divide by {sizes['num_heads']} heads")
  if sizes["image_size"] < sizes["patch_size"]:
    raise InputError(f"{name}: images of {sizes['image_size']} pixels are less than a patch of {sizes['patch_size']}")


def _check_variant(name: str, variant: str, arguments: Mapping[str, Any]) -> None:
  wanted = siglip_arguments(variant)
  wrong = [f"{key} {arguments[key]} (not {value})" for key, value in wanted.items() if arguments[key] != value]
  if wrong:
    raise InputError(f"{name}: is no {variant}: it has {', '.join(wrong)}; name its own variant or none")
