"""Prepares images as the `preprocessor_config.json` of a Hugging Face folder says, for CLIP and DINOv2."""

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vixml_jax.errors import InputError
from vixml_jax.files import read_json_object
from vixml_jax.images.preprocess import AUTO, KINDS, PREPROCESSING, PROCESSOR
from vixml_jax.weights import hf_values, vision

# Image processors of transformers that are known here. They have the same defaults and differ in nothing else.
_TYPES = ("CLIPImageProcessor", "CLIPFeatureExtractor", "BitImageProcessor")
# Keys with a single value that is supported, and the value of an absent key.
_REQUIRED: dict[str, Any] = {
  "do_resize": True,
  "do_center_crop": True,
  "do_rescale": True,
  "do_normalize": True,
  "do_pad": False,
  "use_square_size": False,
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_RESAMPLING = {each.value: each for each in Image.Resampling}
_LONGEST = 16  # Squares.
_MOST_PIXELS = 2**12  # Of an edge.
_LARGEST = 1000  # Mean or standard deviation of a color.


@dataclasses.dataclass(frozen=True)
class Processor:
  """Resizes an image and takes the middle of it, as `CLIPImageProcessor` and `BitImageProcessor` of transformers.

  Attributes:
    edge: Length to which the shorter edge of an image is resized, in pixels.
    keeps_proportions: Whether the longer edge is resized in proportion. Otherwise both edges get the same length.
    size: Side of the square that is cut out of the middle, in pixels, at most `edge`.
    resample: Filter.
    mean: Mean of red, green and blue in 0..1, which is subtracted.
    std: Standard deviation of red, green and blue, by which the difference is divided.
  """

  edge: int
  keeps_proportions: bool
  size: int
  resample: Image.Resampling
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, pixels: np.ndarray) -> np.ndarray:
    """Prepares an image up to the normalization by `mean` and `std`.

    The image of a strip of more than 16 squares is that of its middle 16 squares, since the whole strip would take any
    amount of memory. Its pixels are then off by up to half a pixel from those of transformers.

    Args:
      pixels: uint8 [height, width, 3].

    Returns:
      uint8 [size, size, 3].
    """
    if self.keeps_proportions:
      pixels = _middle(pixels, *(_LONGEST * min(pixels.shape[:2]),) * 2)
    height, width, _ = pixels.shape
    short = min(height, width)
    rows, columns = (int(self.edge * side / short) if self.keeps_proportions else self.edge for side in (height, width))
    resized = Image.fromarray(pixels).resize((columns, rows), self.resample)
    return _middle(np.asarray(resized), self.size, self.size)


def read_processor(folder: Path) -> Processor:
  """Reads `preprocessor_config.json`.

  Raises:
    InputError: If the file is missing or damaged, or asks for something that is not supported.
  """
  path = folder / vision.PROCESSOR_FILE
  settings = read_json_object(
    path,
    absent="fetch it, or save the image processor of the model into the folder by save_pretrained of transformers",
    damaged="fetch it again",
  )
  settings = {key: value for key, value in settings.items() if value is not None}  # transformers writes unset keys.
  kind = settings.get("image_processor_type", settings.get("feature_extractor_type", _TYPES[0]))
  if not isinstance(kind, str) or kind.removesuffix("Fast") not in _TYPES:
    raise InputError(f"{path}: image_processor_type is {kind!r:.60}; it must be one of {', '.join(_TYPES)}")
  for key, wanted in _REQUIRED.items():
    if settings.get(key, wanted) != wanted:
      raise InputError(f"{path}: {key} is {settings[key]!r:.40}; only {wanted} is supported: choose another model")
  factor = settings.get("rescale_factor", 1 / 255)
  if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
    raise InputError(f"{path}: rescale_factor is {factor!r:.40}; only 1/255 is supported: choose another model")
  resample = settings.get("resample", Image.Resampling.BICUBIC.value)
  if type(resample) is not int or resample not in _RESAMPLING:
    raise InputError(
      f"{path}: resample is {resample!r:.40}; it must be the number of a filter of Pillow: fetch it again"
    )
  edge, keeps_proportions = _edge(settings, path)
  size = _side(settings.get("crop_size", 224), path, "crop_size")
  if size > edge:
    raise InputError(f"{path}: crop_size {size} is larger than size {edge}; padding is not supported: correct the file")
  mean, std = _channels(settings, path, "image_mean", _CLIP_MEAN), _channels(settings, path, "image_std", _CLIP_STD)
  if min(std) < 1 / _LARGEST:
    raise InputError(f"{path}: image_std is {list(std)}; it must be at least {1 / _LARGEST}: fetch the file again")
  return Processor(edge, keeps_proportions, size, _RESAMPLING[resample], mean, std)


def choose_preprocessing(name: str, checkpoint: Path) -> str:
  """Returns how images are prepared for a tower: the named way, or for "auto" the first that the tower has.

  Args:
    name: One of `preprocess.KINDS`.
    checkpoint: File or folder that `weights.vision.find_checkpoint` returned.

  Returns:
    A key of `preprocess.PREPROCESSING`, or "processor".

  Raises:
    InputError: If the tower cannot be used, or the named way is not for its family.
  """
  if name not in KINDS:
    raise InputError(f"unknown preprocessing {name!r}; choose from {', '.join(KINDS)}")
  family = vision.family_of(checkpoint)
  allowed = (PROCESSOR,) if family.has_processor else tuple(PREPROCESSING)
  if name == AUTO:
    return allowed[0]
  if name not in allowed:
    raise InputError(
      f"{checkpoint}: preprocessing {name!r} is not for {family.name}; set it to {' or '.join(allowed)}, or to {AUTO}"
    )
  return name


def _middle(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Returns the middle of an image, of at most this size; of two middles the upper or left one."""
  top, left = (max(have - want, 0) // 2 for have, want in zip(pixels.shape, (rows, columns), strict=False))
  return pixels[top : top + rows, left : left + columns]


def _edge(settings: Mapping[str, Any], path: Path) -> tuple[int, bool]:
  """Returns `edge` and `keeps_proportions` of a processor."""
  size = settings.get("size", 224)
  if not isinstance(size, dict):
    return _side(size, path, "size"), True
  if set(size) == {"shortest_edge"}:
    return _side(size["shortest_edge"], path, "size"), True
  return _side(size, path, "size"), False


def _side(value: Any, path: Path, key: str) -> int:
  """Returns the side of a square that is given by a number, or by an equal height and width."""
  side = value
  if isinstance(value, dict) and set(value) == {"height", "width"} and value["height"] == value["width"]:
    side = value["height"]
  if not hf_values.is_size(side) or side > _MOST_PIXELS:
    wanted = "shortest_edge, or " if key == "size" else ""
    raise InputError(
      f"{path}: {key} is {value!r:.80}; it must be {wanted}an equal height and width, of at most {_MOST_PIXELS} pixels"
    )
  return side


def _channels(
  settings: Mapping[str, Any], path: Path, key: str, implied: tuple[float, float, float]
) -> tuple[float, float, float]:
  """Returns three numbers, one for each color."""
  value = settings.get(key, implied)
  values = list(value) if isinstance(value, list | tuple) else [value] * 3
  if len(values) != 3 or not all(type(each) in (int, float) and abs(each) <= _LARGEST for each in values):
    raise InputError(
      f"{path}: {key} is {value!r:.80}; it must be three numbers of at most {_LARGEST}: fetch the file again"
    )
  red, green, blue = map(float, values)
  return red, green, blue
