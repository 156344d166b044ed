"""Square pixels for SigLIP, as big_vision makes them or as Hugging Face's processor does."""

from collections.abc import Callable
import functools

import numpy as np
from PIL import Image


def big_vision(pixels: np.ndarray, size: int) -> np.ndarray:
  """`resize(size)` of big_vision: TF's bilinear without antialiasing, cut to whole numbers.

  big_vision (pp/ops_image.py) casts the resized image back to uint8, which cuts off fractions.

  Args:
    pixels: uint8 [height, width, 3].
    size: side of the square, in pixels; proportions are not kept.

  Returns:
    uint8 [size, size, 3].
  """
  if pixels.shape[:2] == (size, size):
    return pixels
  return resize_bilinear(pixels, size).astype(np.uint8)


def resize_bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
  """What `tf.image.resize(pixels, (size, size), "bilinear", antialias=False)` computes, in float32.

  Half-pixel centers; each output mixes the four pixels around its center, whatever the scale, so that a large image
  is sampled and not averaged. Values outside the image repeat its border.

  Args:
    pixels: uint8 or float32 [height, width, channels].
    size: side of the square.

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
  """The resize of transformers' SiglipImageProcessor: Pillow's, antialiased.

  Args:
    pixels: uint8 [height, width, 3].
    size: side of the square, in pixels; proportions are not kept.
    resample: bicubic is the class's default; the published siglip2 processors say bilinear.

  Returns:
    uint8 [size, size, 3].
  """
  return np.asarray(Image.fromarray(pixels).resize((size, size), resample))


PREPROCESSING: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
  "big_vision": big_vision,
  "huggingface": huggingface,
  "huggingface_bilinear": functools.partial(huggingface, resample=Image.Resampling.BILINEAR),
}
"""Ways to make pixels, by name; the name is recorded with the features."""


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """For each output position the two source positions that it mixes, and the share of the second."""
  scale = np.float32(length) / np.float32(size)
  center = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
  floor = np.floor(center)
  lower = np.maximum(floor, 0).astype(np.int64)
  upper = np.minimum(floor.astype(np.int64) + 1, length - 1)
  return lower, upper, center - floor
