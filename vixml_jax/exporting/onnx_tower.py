"""Writes the image tower of a run as an ONNX model, so that images can become features without vixml_jax."""

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file
from vixml_jax.inference.query_images import check_feature_size, find_tower
from vixml_jax.onnx_models.siglip import siglip_model
from vixml_jax.weights import engine
from vixml_jax.weights.vision import family_of, find_checkpoint, load_tower
from vixml_jax.weights.vision_config import SIGLIP

_log = logging.getLogger(__name__)

_MODEL = "image_tower.onnx"
_MOST_BYTES = 2 * 10**9  # protobuf, in which ONNX models are stored, holds at most 2 GiB.


def write_onnx_tower(
  config: ConfigDict, origin: dict[str, Any] | None, checkpoint: str | None, folder: Path
) -> dict[str, Any] | None:
  """Writes `image_tower.onnx`, in float32, if the tower that made the run's image features is there and a SigLIP.

  Args:
    config: Config of the run.
    origin: How the image features of the training data were made; None if it is not recorded.
    checkpoint: The tower; None for the recorded one, without which a warning is logged and nothing is written.
    folder: Folder to write to.

  Returns:
    `model`, its `sha256`, the `size` of images in pixels and the name of the `preprocessing` that resizes them; None
    if no tower was written.

  Raises:
    InputError: The given tower is not the one of the training data, or onnx is not installed.
  """
  if origin is None:
    _log.warning("no tower is recorded for the image features of this run: the folder takes feature vectors only")
    return None
  try:
    found = find_tower(config, origin, checkpoint)
  except InputError as error:
    if checkpoint is not None:
      raise
    _log.warning("%s; the folder takes feature vectors only", error)
    return None
  family = family_of(find_checkpoint(found.checkpoint))
  if family is not SIGLIP:
    _log.warning(
      "%s: is a %s, and only SigLIP towers are written as ONNX; the folder takes feature vectors only",
      found.checkpoint,
      family.name,
    )
    return None
  params, arguments = load_tower(found.checkpoint, variant=found.variant)
  check_feature_size(found.checkpoint, arguments["embed_dim"], config)
  size = sum(leaf.nbytes for leaf in engine.flatten_tree(params).values())
  if size > _MOST_BYTES:
    _log.warning(
      "%s: has %.1f GB, and an ONNX file at most 2; the folder takes feature vectors only", found.checkpoint, size / 1e9
    )
    return None
  path = folder / _MODEL
  path.write_bytes(siglip_model(params, arguments).SerializeToString())
  return {
    "model": path.name,
    "sha256": sha256_of_file(path),
    "size": arguments["image_size"],
    "preprocessing": found.preprocessing,
  }
