"""Published SigLIP and SigLIP 2 vision towers by name; the format of big_vision; writes both formats."""

from collections.abc import Mapping
import math
import os
import re
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.weights import engine, hf_folder, tables, vision_config
from vixml_jax.weights.npz import write_npz

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

_QUERY = "MultiHeadDotProductAttention_0/query/kernel"


def siglip_arguments(variant: str) -> dict[str, Any]:
  """Returns the arguments with which `models.vision.VisionTransformer` is a published tower.

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
    params: Parameters as `vision.load_tower` returns them, in float32, float16 or bfloat16.
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
    params: Parameters as `vision.load_tower` returns them.
    folder: Folder to write to. It is created if it does not exist.
    arguments: Arguments of the tower as `vision.load_tower` returns them.

  Raises:
    InputError: If the parameters are not those of a tower.
  """
  keys, required = vision_config.SIGLIP.keys, vision_config.SIGLIP.required
  settings = {key: arguments.get(argument, implied) for argument, (key, implied) in keys.items()}
  hf_folder.save_pretrained(
    params,
    folder,
    {"architectures": ["SiglipVisionModel"], "model_type": tables.SIGLIP.name, **settings, **required},
    tables.SIGLIP,
  )


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


def check_variant(name: str, variant: str, arguments: Mapping[str, Any]) -> None:
  """Raises InputError if the arguments of a checkpoint with this name are not those of a variant."""
  wanted = siglip_arguments(variant)
  wrong = [f"{key} {arguments[key]} (not {value})" for key, value in wanted.items() if arguments[key] != value]
  if wrong:
    raise InputError(f"{name}: is not {variant}: it has {', '.join(wrong)}; give its own variant or none")
