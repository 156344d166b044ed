"""Reads vision towers: files of big_vision, and folders of SigLIP, CLIP and DINOv2 in the format of Hugging Face."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.models.vision import define_vision
from vixml_jax.weights import engine, hf_folder, hf_values, siglip, source, vision_config
from vixml_jax.weights.npz import NpzFile

PROCESSOR_FILE = "preprocessor_config.json"
"""File of a Hugging Face folder that says how images are prepared."""

_NO_SIZES = ("layer_norm_eps", "activation", "gated", "layer_scale", "patch_bias", "class_token", "embedding_norm")


def load_tower(
  path: str | os.PathLike[str], *, variant: str | None = None, image_size: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a vision tower.

  A Hugging Face folder has the weights of a SiglipModel, SiglipVisionModel, CLIPModel, CLIPVisionModel,
  CLIPVisionModelWithProjection, Dinov2Model or Dinov2WithRegistersModel. The features of a CLIP with a projection are
  its `image_embeds` in transformers. All others are its `pooler_output`; for CLIP and DINOv2, this is the class token
  after the last norm.

  Args:
    path: An `.npz` file of big_vision with the image tower of SigLIP or both towers, a Hugging Face folder, a
      name on the hub, or one of `siglip.VARIANTS`, which is fetched from the hub.
    variant: One of `siglip.VARIANTS` that the checkpoint must be; None to accept any.
    image_size: Image size in pixels; None for that of the checkpoint. If the grid of patches differs from the
      checkpoint's, the position embeddings are resized.

  Returns:
    `(params, arguments)`: a nested dict of float32 numpy arrays, and the arguments of
    `models.vision.VisionTransformer`, except dtype, remat and rngs.

  Raises:
    InputError: If the file is missing or damaged, the architecture or variant differs, or the weights do not fit
      exactly.
  """
  path = find_checkpoint(path)
  checkpoint: engine.TensorSource
  family = vision_config.SIGLIP
  if path.is_dir():
    checkpoint = hf_folder.SafetensorsFolder(path)
    family, arguments = vision_config.read_tower(path, checkpoint.names())
    table = family.table(arguments)
  else:
    checkpoint = NpzFile(path)
    arguments, table = siglip.npz_arguments(checkpoint)
  _check_sizes(checkpoint.name, arguments)
  if variant is not None:
    if family is not vision_config.SIGLIP:
      raise InputError(
        f"{checkpoint.name}: is a {family.name}, which has no variants; leave out variant {variant!r:.60}"
      )
    siglip.check_variant(checkpoint.name, variant, arguments)
  _, shapes, _ = define_vision(arguments)
  params = engine.apply(table, checkpoint, shapes)
  if image_size is None:
    return params, arguments
  resized = arguments | {"image_size": image_size}
  _check_sizes("image_size", resized)
  positions, first = params["position_embedding"], int(arguments.get("class_token", False))
  grid = image_size // arguments["patch_size"]
  positions = np.concatenate([positions[:first], family.resize_positions(positions[first:], grid)])
  return params | {"position_embedding": positions}, resized


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
  """Returns the `.npz` file or local folder that `load_tower` reads for a path; fetches it if it is on the hub."""
  if str(path).endswith(".npz"):
    if not _is_file(path):
      raise InputError(f"{path}: no such file; give an npz file of big_vision or a Hugging Face folder")
    return Path(path)
  return source.resolve(siglip.VARIANTS.get(str(path), str(path)), tokenizer=False)


def family_of(path: Path) -> vision_config.Family:
  """Returns the family of the tower in a file or folder that `find_checkpoint` returned.

  Raises:
    InputError: If it is a folder whose model is of no family that is supported.
  """
  return vision_config.family_of(path) if path.is_dir() else vision_config.SIGLIP


def checkpoint_hashes(path: str | os.PathLike[str]) -> dict[str, str]:
  """Returns the sha256 of each file that decides the features of a tower, by file name.

  These are the weights that `load_tower` reads. For a CLIP or DINOv2 they are also `config.json` and
  `preprocessor_config.json`, because both have settings that the weights do not show.
  """
  path = find_checkpoint(path)
  if not path.is_dir():
    return {path.name: source.file_hash(path)}
  settings = ("config.json", PROCESSOR_FILE) if family_of(path).has_processor else ()
  return source.weight_hashes(path) | {name: source.file_hash(path / name) for name in settings}


def _is_file(path: str | os.PathLike[str]) -> bool:
  try:
    return Path(path).is_file()
  except OSError:  # The name is too long.
    return False


def _check_sizes(name: str, arguments: Mapping[str, Any]) -> None:
  """Raises InputError for sizes, read from a file, that are impossible."""
  sizes = {key: value for key, value in arguments.items() if key not in _NO_SIZES}
  wrong = [f"{key} {value!r:.40}" for key, value in sizes.items() if not hf_values.is_size(value)]
  if wrong:
    raise InputError(
      f"{name}: has {', '.join(wrong)}; it must be a positive integer of at most {hf_values.MAX_SIZE:,}: fetch the "
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
