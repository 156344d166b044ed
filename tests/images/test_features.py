"""Image features: each item's first images, on the devices or on the host with the same result, and their cache."""

import jax
import numpy as np
import pytest

from tests.helpers.damage import DAMAGES, files_of
from tests.helpers.image_features import write_random_features
from tests.helpers.miniature import write_raw_folder
from vixml_jax import datasets, sharding
from vixml_jax.encoding.inputs import image_tokens
from vixml_jax.errors import InputError
from vixml_jax.images.feature_set import write_features
from vixml_jax.images.features import bytes_per_device, load_image_features
from vixml_jax.input.packing import PackedImages

DIM = 6


@pytest.fixture(scope="module")
def features(tmp_path_factory):
  """A data set, and random features of its images."""
  folder = tmp_path_factory.mktemp("bank")
  builder = datasets.prepare("custom", write_raw_folder(folder / "raw", num_train=40), folder / "data")
  return write_random_features(builder, folder / "data", "random", DIM), folder


@pytest.mark.parametrize("images", [1, 3])
def test_an_item_s_rows_are_its_first_images(features, images):
  feature_set, folder = features
  loaded = load_image_features(feature_set, images, folder / "banks")
  vectors = loaded.features.values
  for split in ("train", "test", "labels"):
    blocks = list(feature_set.split(split))
    lengths = np.concatenate([lengths for lengths, _ in blocks])
    values = np.concatenate([values for _, values in blocks])
    starts = np.cumsum(lengths) - lengths
    assert len(loaded.rows[split]) == len(lengths)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
      kept = values[start : start + min(length, images)]
      np.testing.assert_array_equal(vectors[loaded.rows[split][row]], kept)
  assert len(vectors) == sum(len(rows.values) for rows in loaded.rows.values())


def test_features_are_read_once_and_then_opened_from_the_cache(features, monkeypatch):
  feature_set, folder = features
  first = load_image_features(feature_set, 2, folder / "banks").features
  monkeypatch.setattr(type(feature_set), "split", lambda *_: pytest.fail("the features were read again"))
  again = load_image_features(feature_set, 2, folder / "banks").features
  np.testing.assert_array_equal(again.values, first.values)


@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=2, fsdp=2, tensor=2)])
def test_device_and_host_give_the_same_features_in_the_same_places(features, mesh):
  feature_set, folder = features
  mesh = sharding.make_mesh(**mesh)
  features_on_host = load_image_features(feature_set, 3, folder / "banks").features
  on_devices, on_host = features_on_host.placed(mesh, "device"), features_on_host.placed(mesh, "host")
  assert on_host.on_devices is None
  assert features_on_host.placed(mesh, "auto").on_devices is not None
  rows = np.random.default_rng(0).integers(0, len(features_on_host.values), (2, 8, 5)).astype(np.int32)
  packed = PackedImages(rows, np.ones_like(rows), np.zeros_like(rows))
  found = [
    jax.jit(lambda images, vectors: image_tokens(jax.tree.map(lambda x: x[1], images), vectors).features)(
      placed.on_mesh(packed, mesh), placed.on_devices
    )
    for placed in (on_devices, on_host)
  ]
  for features_found in found:
    np.testing.assert_array_equal(features_found, features_on_host.values[rows[1]])


def test_memory_per_device_is_what_sharded_features_take(features):
  feature_set, folder = features
  features_on_host = load_image_features(feature_set, 3, folder / "banks").features
  for devices in (1, 4, 8):
    mesh = sharding.make_mesh(data=devices, devices=jax.devices()[:devices])
    placed = features_on_host.placed(mesh, "device").on_devices
    wanted = bytes_per_device(len(features_on_host.values), DIM, mesh)
    assert {shard.data.nbytes for shard in placed.addressable_shards} == {wanted}


def test_a_set_without_a_single_image_is_refused(features):
  _, folder = features
  builder = datasets.open_dataset("custom", folder / "data")
  empty = write_features(
    builder,
    folder / "data",
    "none",
    {"dim": DIM},
    lambda split, start, stop: ((np.zeros(0, np.int32), np.zeros((0, DIM), np.float16)) for _ in range(start, stop)),
  )
  with pytest.raises(InputError, match="none of its items has an image"):
    load_image_features(empty, 3, folder / "banks")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_is_written_again(features, caplog, kind):
  feature_set, folder = features
  whole = load_image_features(feature_set, 3, folder / "other")
  (target,) = (path for path in (folder / "other").iterdir() if path.is_dir())
  for name in files_of(target):
    caplog.clear()
    DAMAGES[kind](target / name)
    again = load_image_features(feature_set, 3, folder / "other")
    np.testing.assert_array_equal(again.features.values, whole.features.values)
    (line,) = caplog.messages
    assert str(target / name) in line and line.endswith("the folder is written again")
