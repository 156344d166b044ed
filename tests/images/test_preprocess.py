"""Pixels are those of big_vision and of Hugging Face's processor, computed here by other means."""

import math

import numpy as np
from PIL import Image
import pytest
import torch
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vixml_jax.images.preprocess import PREPROCESSING, big_vision, resize_bilinear

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (5, 3), (16, 16), (40, 17), (3, 64)]


def pixels_of(shape):
  return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


def per_pixel(pixels, size):
  """TensorFlow's bilinear kernel (resize_bilinear_op.cc, half-pixel centers), a pixel at a time in float32."""
  f = np.float32
  height, width, _ = pixels.shape
  out = np.zeros((size, size, 3), f)
  for y in range(size):
    for x in range(size):
      in_y = (f(y) + f(0.5)) * (f(height) / f(size)) - f(0.5)
      in_x = (f(x) + f(0.5)) * (f(width) / f(size)) - f(0.5)
      top, left = math.floor(in_y), math.floor(in_x)
      y_lerp, x_lerp = in_y - f(top), in_x - f(left)
      rows = [max(top, 0), min(top + 1, height - 1)]
      columns = [max(left, 0), min(left + 1, width - 1)]
      for c in range(3):
        (a, b), (d, e) = [[f(pixels[row, column, c]) for column in columns] for row in rows]
        upper, lower = a + (b - a) * x_lerp, d + (e - d) * x_lerp
        out[y, x, c] = upper + (lower - upper) * y_lerp
  return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [4, 15])
def test_bilinear_is_tensorflows_to_the_last_bit(shape, size):
  np.testing.assert_array_equal(resize_bilinear(pixels_of(shape), size), per_pixel(pixels_of(shape), size))


@pytest.mark.parametrize("shape", SHAPES)
def test_bilinear_agrees_with_torch(shape):
  pixels = pixels_of(shape)
  batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
  expected = torch.nn.functional.interpolate(batch, (12, 12), mode="bilinear", align_corners=False, antialias=False)
  np.testing.assert_allclose(resize_bilinear(pixels, 12), expected[0].permute(1, 2, 0).numpy(), atol=2e-3)


def _line(values, size):
  """One channel of the first row, resized from a square of equal rows."""
  pixels = np.broadcast_to(np.array(values, np.uint8)[None, :, None], (len(values), len(values), 3))
  return big_vision(np.ascontiguousarray(pixels), size)[0, :, 0].tolist()


def test_big_vision_by_hand():
  # Centers at -0.25, 0.25, 0.75, 1.25 of the source.
  assert _line([0, 100], 4) == [0, 25, 75, 100]
  # 63.75 and 191.25: the cast to uint8 cuts off, it does not round.
  assert _line([0, 255], 4) == [0, 63, 191, 255]
  # Without antialiasing only the two pixels around each center (1.5 and 5.5) count.
  assert _line([255, 10, 20, 255, 255, 30, 60, 255], 2) == [15, 45]


def test_image_of_the_right_size_is_left_as_it_is():
  pixels = pixels_of((16, 16))
  for preprocess in PREPROCESSING.values():
    np.testing.assert_array_equal(preprocess(pixels, 16), pixels)


@pytest.mark.parametrize(
  "name, options", [("huggingface", {}), ("huggingface_bilinear", {"resample": Image.Resampling.BILINEAR})]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_huggingface_is_siglips_processor(name, options, shape):
  processor = SiglipImageProcessorPil(size={"height": 12, "width": 12}, **options)
  expected = processor(Image.fromarray(pixels_of(shape)), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  pixels = PREPROCESSING[name](pixels_of(shape), 12)
  assert pixels.dtype == np.uint8
  np.testing.assert_allclose(pixels.astype(np.float32) / 255 * 2 - 1, expected, atol=2e-7)


def test_the_ways_of_resizing_differ_for_a_large_image():
  pixels = pixels_of((40, 40))
  results = [preprocess(pixels, 12).astype(int) for preprocess in PREPROCESSING.values()]
  assert np.abs(results[0] - results[1]).mean() > 10
  assert np.abs(results[1] - results[2]).mean() > 1
