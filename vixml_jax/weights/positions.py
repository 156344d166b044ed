"""Resizes position embeddings to another grid of patches, in the ways of big_vision and of transformers."""

import math

import numpy as np
import scipy.ndimage


def resize_bilinear(positions: np.ndarray, grid: int) -> np.ndarray:
  """Resizes position embeddings by bilinear interpolation; corners stay at corners.

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


def resize_bicubic(positions: np.ndarray, grid: int, antialias: bool = False) -> np.ndarray:
  """Resizes position embeddings by bicubic interpolation, with the outer borders of the patches fixed.

  Args:
    positions: Position embeddings [old grid squared, D].
    grid: Number of patches in a row and in a column.
    antialias: Whether a smaller grid averages over all old positions. The cubics differ as well, as in torch.

  Returns:
    float32 [grid squared, D].

  Reference: `interpolate_pos_encoding` of transformers: `CLIPVisionEmbeddings`, `Dinov2Embeddings`, and with
  `antialias` `Dinov2WithRegistersEmbeddings`. They call torch's `interpolate` with `align_corners=False`.
  """
  old = math.isqrt(len(positions))
  if grid == old:
    return positions
  weights = _antialiased_weights(old, grid) if antialias else _cubic_weights(old, grid)
  image = positions.reshape(old, old, -1).astype(np.float64)
  resized = np.einsum("yh,xw,hwd->yxd", weights, weights, image, optimize=True)
  return resized.reshape(grid**2, -1).astype(np.float32)


def _cubic_weights(old: int, new: int) -> np.ndarray:
  """Returns the weights [new, old] of a row: four around each center; positions outside repeat the border."""
  centers = (np.arange(new) + 0.5) * (old / new) - 0.5
  weights = np.zeros((new, old))
  for offset in (-1, 0, 1, 2):
    taps = np.floor(centers).astype(np.int64) + offset
    np.add.at(weights, (np.arange(new), np.clip(taps, 0, old - 1)), _cubic(taps - centers, -0.75))
  return weights


def _antialiased_weights(old: int, new: int) -> np.ndarray:
  """Returns the weights [new, old] of a row: the cubic is as wide as a new patch; there are none outside."""
  centers = (np.arange(new) + 0.5) * (old / new) - 0.5
  weights = _cubic((np.arange(old) - centers[:, None]) / max(old / new, 1), -0.5)
  return weights / weights.sum(1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Returns the cubic convolution kernel with the parameter a (Keys 1981)."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((x - 5) * x + 8) * x * a - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0))
