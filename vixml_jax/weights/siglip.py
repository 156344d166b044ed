"""Published SigLIP and SigLIP 2 vision towers by name; reads and writes the formats of big_vision and Hugging Face."""

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

# Size -> its name on the hub, and the sizes of the tower.
_SIZES: dict[str, tuple[str, dict[str, int]]] = {
  "b": ("base", {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "mlp_dim": 3072}),
  "l": ("large", {"num_layers": 24, "embed_dim": 1024, "num_heads": 16, "mlp_dim": 4096}),
  "so400m": ("so400m", {"num_layers": 27, "embed_dim": 1152, "num_heads": 16, "mlp_dim": 4304}),
  "g-opt": ("giant-opt", {"num_layers": 40, "embed_dim": 1536, "num_heads": 16, "mlp_dim": 6144}),
}

# Name of a variant in big_vision -> name on the hub. These are SigLIP 2, without its NaFlex variants, which have no
# fixed resolution, and the English SigLIP.
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

# Argument of models.siglip.SiglipVision -> key of the vision config on the hub, and the value of an absent key, because
# transformers does not write values that equal its defaults.
_CONFIG_KEYS: dict[str, tuple[str, int | float]] = {
  "image_size": ("image_size", 224),
  "patch_size": ("patch_size", 16),
  "num_layers": ("num_hidden_layers", 12),
  "embed_dim": ("hidden_size", 768),
  "num_heads": ("num_attention_heads", 12),
  "mlp_dim": ("intermediate_size", 3072),
  "layer_norm_eps": ("layer_norm_eps", 1e-6),
}

# Key -> the only value that the tower supports, which is also the value of an absent key.
_REQUIRED: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "vision_use_head": True}

_MODEL_TYPES = ("siglip", "siglip_vision_model")
_QUERY = "MultiHeadDotProductAttention_0/query/kernel"


def siglip_arguments(variant: str) -> dict[str, Any]:
  """Returns the arguments with which `models.siglip.SiglipVision` is a published tower.

  Args:
    variant: One of `VARIANTS`, such as siglip2_so400m14_384.

  Returns:
    image_size, patch_size, num_layers, embed_dim, num_heads and mlp_dim.

  Raises:
    InputError: If the variant is unknown.
  """
  found = re.fullmatch(r"siglip2?_(.*?)(\d\d)_(\d+)", variant)
  if found is None or variant not in VARIANTS:
    raise InputError(f"variant {variant!r} is not known; it must be one of {', '.join(VARIANTS)}")
  size, patch, pixels = found.groups()
  return {"image_size": int(pixels), "patch_size": int(patch), **_SIZES[size][1]}


def load_siglip(
  path: str | os.PathLike[str], *, variant: str | None = None, image_size: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a vision tower.

  Args:
    path: An `.npz` file of big_vision with the image tower or both towers, a Hugging Face folder of a SiglipModel or
      SiglipVisionModel, a name on the hub, or one of `VARIANTS`, which is fetched from the hub.
    variant: One of `VARIANTS` that the checkpoint must be; None to accept any.
    image_size: Image size in pixels; None for that of the checkpoint. If the grid of patches differs from the
      checkpoint's, the position embeddings are resized.

  Returns:
    `(params, arguments)`: a nested dict of float32 numpy arrays, and the arguments of `models.siglip.SiglipVision`,
    except dtype, remat and rngs.

  Raises:
    InputError: If the file is missing or damaged, the architecture or variant differs, or the weights do not fit
      exactly.
  """
  path = find_checkpoint(path)
  checkpoint: engine.TensorSource
  if path.is_dir():
    arguments, table, checkpoint = _folder_arguments(path), tables.SIGLIP, hf_folder.SafetensorsFolder(path)
  else:
    checkpoint = NpzFile(path)
    arguments, table = npz_arguments(checkpoint)
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
  """Returns the `.npz` file or local folder that `load_siglip` reads for a path; fetches it if it is on the hub."""
  if str(path).endswith(".npz"):
    if not _is_file(path):
      raise InputError(f"{path}: no such file; give an npz file of big_vision or a Hugging Face folder")
    return Path(path)
  return source.resolve(VARIANTS.get(str(path), str(path)), tokenizer=False)


def checkpoint_hashes(path: str | os.PathLike[str]) -> dict[str, str]:
  """Returns the sha256 of each file of weights that `load_siglip` reads for a path, by file name."""
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
  """Writes a tower in the format of big_vision.

  Args:
    params: Parameters as `load_siglip` returns them, in float32, float16 or bfloat16.
    path: The file.
    stacked: Whether the layers are stacked in one tensor `encoderblock/...` instead of one tensor per layer,
      `encoderblock_0/...`.
    prefix: Prefix of every name; `params/img/` in published files.
    dtype: Dtype of the tensors in the file: float32, float16 or bfloat16; None to keep the dtypes of the parameters.

  Raises:
    InputError: If the parameters are not those of a tower.
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
    params: Parameters as `load_siglip` returns them.
    folder: Folder to write to. It is created if it does not exist.
    arguments: Arguments of the tower as `load_siglip` returns them.

  Raises:
    InputError: If the parameters are not those of a tower.
  """
  settings = {key: arguments.get(argument, implied) for argument, (key, implied) in _CONFIG_KEYS.items()}
  hf_folder.save_pretrained(
    params,
    folder,
    {"architectures": ["SiglipVisionModel"], "model_type": tables.SIGLIP.name, **settings, **_REQUIRED},
    tables.SIGLIP,
  )


def resize_positions(positions: np.ndarray, grid: int) -> np.ndarray:
  """Resizes position embeddings to another grid of patches by bilinear interpolation; corners stay at corners.

  Args:
    positions: Position embeddings [old grid squared, D].
    grid: Number of patches in a row and in a column.

  Returns:
    [grid squared, D].

  Reference: `resample_posemb` in big_vision (models/vit.py), which calls the same function of scipy.
  """
  old = math.isqrt(len(positions))
  if grid == old:
    return positions
  zoomed = scipy.ndimage.zoom(positions.reshape(old, old, -1), (grid / old, grid / old, 1), order=1)
  return zoomed.reshape(grid**2, -1)


def _is_file(path: str | os.PathLike[str]) -> bool:
  try:
    return Path(path).is_file()
  except OSError:  # The name is too long.
    return False


def _folder_arguments(folder: Path) -> dict[str, Any]:
  """Returns the arguments of the tower that a Hugging Face folder's `config.json` describes."""
  settings = hf_config.read_config(folder)
  path = folder / "config.json"
  if settings.get("model_type") not in _MODEL_TYPES:
    raise InputError(
      f"{path}: model_type is {settings.get('model_type')!r:.60}; it must be one of {', '.join(_MODEL_TYPES)} (the "
      "fixed resolutions of SigLIP 2 are siglip; NaFlex is not supported)"
    )
  settings = settings.get("vision_config", {}) if settings["model_type"] == "siglip" else settings
  if not isinstance(settings, dict):
    raise InputError(f"{path}: vision_config is {settings!r:.60}; it must be an object: fetch the file again")
  for key, wanted in _REQUIRED.items():
    if settings.get(key, wanted) != wanted:
      raise InputError(
        f"{path}: {key} is {settings[key]!r:.60}; the tower supports only {wanted!r}: choose another model"
      )
  arguments = {argument: settings.get(key, implied) for argument, (key, implied) in _CONFIG_KEYS.items()}
  names = {argument: key for argument, (key, _) in _CONFIG_KEYS.items()}
  hf_config.check_numbers(path, arguments, names)
  return arguments


def npz_arguments(checkpoint: engine.TensorSource) -> tuple[dict[str, Any], tables.Table]:
  """Returns the arguments of the tower in a file of big_vision, and the table for its stacked or unstacked layers.

  Only names and shapes are read.

  Raises:
    InputError: If the file has no SigLIP image tower.
  """
  originals, _ = engine.original_names(tables.BIG_VISION_STACKED, checkpoint)
  # At most six digits: any number of layers would be counted.
  numbers = {int(found[1]) for name in originals if (found := re.match(r"Transformer/encoderblock_(\d{1,6})/", name))}

  def shape(name: str, dimensions: int) -> tuple[int, ...]:
    found = checkpoint.shape(originals[name]) if name in originals else None
    if found is None or len(found) != dimensions:
      what = "has no tensor" if found is None else f"has a tensor of shape {list(found)!s:.80} for"
      raise InputError(f"{checkpoint.name}: {what} {name}; give a file with a SigLIP image tower of big_vision")
    return found

  patch, _, _, embed_dim = shape("embedding/kernel", 4)
  positions = shape("pos_embedding", 3)[1]
  _, num_heads, _ = shape(f"MAPHead_0/{_QUERY}", 3)
  _, mlp_dim = shape("MAPHead_0/MlpBlock_0/Dense_0/kernel", 2)
  num_layers = max(numbers) + 1 if numbers else shape(f"Transformer/encoderblock/{_QUERY}", 4)[0]
  grid = math.isqrt(positions)
  if grid**2 != positions:
    raise InputError(
      f"{checkpoint.name}: {positions} positions are not a square of patches; give a file of a tower with square"
      " images and without a class token"
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
  """Returns the image size in pixels of a tower; its file determines only the number of patches."""
  for variant in VARIANTS:
    published = siglip_arguments(variant)
    if arguments.items() <= published.items() and published["image_size"] // published["patch_size"] == grid:
      return published["image_size"]
  return grid * arguments["patch_size"]


def _check_sizes(name: str, arguments: Mapping[str, Any]) -> None:
  """Raises InputError for sizes, read from a file, that are impossible."""
  sizes = {key: value for key, value in arguments.items() if key != "layer_norm_eps"}
  wrong = [f"{key} {value!r:.40}" for key, value in sizes.items() if not hf_config.is_size(value)]
  if wrong:
    raise InputError(
      f"{name}: has {', '.join(wrong)}; it must be a positive integer of at most {hf_config.MAX_SIZE:,}: fetch the "
      "file again"
    )
  if sizes["embed_dim"] % sizes["num_heads"]:
    raise InputError(
      f"{name}: a width of {sizes['embed_dim']} is not divisible by {sizes['num_heads']} heads: fetch the file again"
    )
  if sizes["image_size"] < sizes["patch_size"]:
    raise InputError(
      f"{name}: images of {sizes['image_size']} pixels are smaller than a patch of {sizes['patch_size']}: use larger "
      "images"
    )


def _check_variant(name: str, variant: str, arguments: Mapping[str, Any]) -> None:
  """Raises InputError if the arguments are not those of a variant."""
  wanted = siglip_arguments(variant)
  wrong = [f"{key} {arguments[key]} (not {value})" for key, value in wanted.items() if arguments[key] != value]
  if wrong:
    raise InputError(f"{name}: is not {variant}: it has {', '.join(wrong)}; give its own variant or none")
