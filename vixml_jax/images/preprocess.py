"""Resizes images to squares for SigLIP, in the ways of big_vision and of Hugging Face; names of all ways."""

from collections.abc import Callable
import functools

import numpy as np
from PIL import Image


def big_vision(pixels: np.ndarray, size: int) -> np.ndarray:
  """Resizes an image as `resize(size)` of big_vision: TensorFlow's bilinear resize, truncated to integers.

  big_vision (pp/ops_image.py) casts the resized image back to uint8, which truncates. It does not antialias.

  Args:
    pixels: uint8 [height, width, 3].
    size: Side of the square, in pixels. The aspect ratio is not kept.

  Returns:
    uint8 [size, size, 3].
  """
  if pixels.shape[:2] == (size, size):
    return pixels
  return resize_bilinear(pixels, size).astype(np.uint8)


def resize_bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
  """Computes `tf.image.resize(pixels, (size, size), "bilinear", antialias=False)` in float32.

  Pixels have half-integer centers. Each output pixel mixes the four pixels around its center at any scale, so a large
  image is sampled and not averaged. Values outside the image repeat its border.

  Args:
    pixels: uint8 or float32 [height, width, channels].
    size: Side of the square, in pixels.

  Returns:
    float32 [size, size, channels].
  """
  top, bottom, down = _taps(pixels.shape[0], size)
  left, right, across = _taps(pixels.shape[1], size)
  across = across[:, None]

  def row(index: np.ndarray) -> np.ndarray:
    lines = pixels[index]
    start = lines[:, left].astype(np.float32)
    return start + (lines[:, right].astype(np.float32) - start) * across

  upper = row(top)
  return upper + (row(bottom) - upper) * down[:, None, None]


def huggingface(pixels: np.ndarray, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
  """Resizes an image as transformers' SiglipImageProcessor, with Pillow and antialiasing.

  Args:
    pixels: uint8 [height, width, 3].
    size: Side of the square, in pixels. The aspect ratio is not kept.
    resample: Filter. Bicubic is the default of the class; the published siglip2 processors set bilinear.

  Returns:
    uint8 [size, size, 3].
  """
  return np.asarray(Image.fromarray(pixels).resize((size, size), resample))


PREPROCESSING: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
  "big_vision": big_vision,
  "huggingface": huggingface,
  "huggingface_bilinear": functools.partial(huggingface, resample=Image.Resampling.BILINEAR),
}
"""Ways to resize an image for SigLIP, by name. The name is recorded with the features."""

PROCESSOR = "processor"
"""The way of `images.processor`, which a CLIP or DINOv2 has in its own file."""

AUTO = "auto"
"""`big_vision` for SigLIP, and `processor` for CLIP and DINOv2."""

KINDS = (AUTO, *PREPROCESSING, PROCESSOR)
"""Values of the setting `preprocessing`."""


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the two source positions that each output position mixes, and the weight of the second."""
  scale = np.float32(length) / np.float32(size)
  center = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
  floor = np.floor(center)
  lower = np.maximum(floor, 0).astype(np.int64)
  upper = np.minimum(floor.astype(np.int64) + 1, length - 1)
  return lower, upper, center - floor
