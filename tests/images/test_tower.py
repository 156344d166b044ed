"""A tower encodes images in memory as it encodes parts of a source, and images that were prepared before."""

from concurrent.futures import ThreadPoolExecutor
import io

import jax
import numpy as np
from PIL import Image
import pytest

from vixml_jax.images import decoding
from vixml_jax.images.decoding import BadImage
from vixml_jax.images.sources import EncodedImage
from vixml_jax.images.tower import ImageTower
from vixml_jax.models.vision import define_vision
from vixml_jax.weights.siglip import save_npz

ARGUMENTS = dict(image_size=8, patch_size=4, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), define_vision(ARGUMENTS)[1])
  path = tmp_path_factory.mktemp("tower") / "tiny.npz"
  save_npz(params, path)
  return ImageTower(str(path), None, "big_vision", 4, "float32")


def blobs(count=11, seed=0):
  """PNG files, images of several sizes; some need no resizing."""
  rng = np.random.default_rng(seed)
  files = []
  for number in range(count):
    buffer = io.BytesIO()
    shape = (8, 8, 3) if number % 2 else (5 + number, 9, 3)
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(buffer, "PNG")
    files.append(buffer.getvalue())
  return files


class OnePart:
  """A source that has all images in its part 0."""

  num_parts, identity = 1, None

  def __init__(self, images):
    self._images = images

  def read(self, parts):
    for part in parts:
      yield part, [EncodedImage(row, 0, image) for row, image in enumerate(self._images)]


def test_images_in_memory_and_in_files_are_encoded_as_a_part_of_a_source(tower, tmp_path):
  images = blobs()
  images[3], images[7] = b"", images[7][:60]
  [(_, part)] = tower.encode_parts(OnePart(images), [0], "made")
  files = []
  for number, image in enumerate(images):
    files.append(tmp_path / str(number) if number % 3 else image)
    (tmp_path / str(number)).write_bytes(image)
  features, reasons = tower.encode(files)
  assert features.dtype == np.float16 and features.shape == (11, tower.dim)
  np.testing.assert_array_equal(features, part.features)
  wanted = [None] * 11
  wanted[3], wanted[7] = decoding.EMPTY, decoding.DAMAGED
  assert reasons == part.reasons == wanted
  assert not features[[3, 7]].any() and (np.abs(features).sum(1) > 0).sum() == 9


def test_prepared_images_have_the_features_of_their_files(tower):
  images = blobs()
  with ThreadPoolExecutor(4) as pool:
    prepared = list(pool.map(tower.prepare, images))
  assert all(image.pixels.shape == (8, 8, 3) and image.pixels.dtype == np.uint8 for image in prepared)
  wanted, _ = tower.encode(images)
  features, reasons = tower.encode(prepared)
  np.testing.assert_array_equal(features, wanted)
  assert reasons == [None] * 11
  mixed, _ = tower.encode([*prepared[:5], *images[5:]])
  np.testing.assert_array_equal(mixed, wanted)


def test_preparing_an_image_without_pixels_raises_the_reason(tower):
  with pytest.raises(BadImage, match=decoding.NOT_AN_IMAGE):
    tower.prepare(b"404")


def test_no_images_have_no_features(tower, tmp_path):
  features, reasons = tower.encode([])
  assert features.shape == (0, tower.dim) and features.dtype == np.float16 and reasons == []
  features, reasons = tower.encode([tmp_path / "nothing.png"])
  assert not features.any() and reasons == [decoding.UNREADABLE]
