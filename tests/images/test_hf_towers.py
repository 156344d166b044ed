"""Features of CLIP and DINOv2 folders, from raw data to the feature set, equal those of transformers."""

import io
import logging
import shutil

import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import miniature, tiny_towers
from tests.helpers.miniature_runs import run_commands
from vixml_jax import datasets
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.exporting.onnx_tower import write_onnx_tower
from vixml_jax.images.extraction import prepare_features
from vixml_jax.images.tower import ImageTower
from vixml_jax.inference.query_images import find_tower
from vixml_jax.run.inference_files import image_origin
from vixml_jax.weights import source

# The sizes of the processor differ from the size of the model, so that DINOv2 resizes its positions.
NAMES = ["clip", "clip projection", "dinov2", "dinov2 registers swiglu"]
_SIZES = {name: (36, 30) if name.startswith("clip") else (36, 24) for name in NAMES}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """Folder with a prepared set with images, and a tower of each name; nothing writes into it but the commands."""
  folder = tmp_path_factory.mktemp("shared")
  miniature.write_raw_folder(folder / "raw", num_train=12, num_test=4, num_labels=6, images=True)
  datasets.prepare("custom", folder / "raw", folder / "data")
  for name in NAMES:
    tiny_towers.write_tower(folder / name.replace(" ", "_"), name, *_SIZES[name])
  return folder


def _expected(builder, split, name):
  """Features of all images of a split: the processor and the model of transformers."""
  rows = (record for batch in Records(builder, split).batches() for record in batch)
  images = [Image.open(io.BytesIO(blob)).convert("RGB") for row in rows for _, blob in row.images()]
  pixels = tiny_towers.hf_processor(name, *_SIZES[name])(images, return_tensors="np")["pixel_values"]
  return tiny_towers.hf_features(tiny_towers.hf_tower(name), pixels.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_transformers_and_their_origin_is_recorded(shared, tmp_path, name):
  builder = datasets.open_dataset("custom", shared / "data")
  tower = shared / name.replace(" ", "_")
  features = prepare_features(builder, tmp_path, str(tower), batch_size=8)
  size = tiny_towers.TOWERS[name][1]
  for split in ("train", "test", "labels"):
    found = np.concatenate([values for _, values in features.split(split)]).astype(np.float32)
    wanted = _expected(builder, split, name)
    assert found.shape == wanted.shape and found.shape[1] == size == features.dim
    np.testing.assert_allclose(found, wanted, atol=4e-3, rtol=1e-3)  # float16 has 11 bits.
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(wanted, axis=1), rtol=1e-3)
  assert features.builder.info.full_name == f"custom_features/{tower.name}/1.0.0"
  files = ("config.json", "model.safetensors", "preprocessor_config.json")
  made = {"checkpoint": str(tower), "preprocessing": "processor", "variant": "", "dtype": "float32", "dim": size}
  assert {key: features.metadata[key] for key in made} == made
  assert features.metadata["checkpoint_sha256"] == sorted(source.file_hash(tower / file) for file in files)


def test_photos_have_the_features_of_transformers(shared):
  rng = np.random.default_rng(0)
  blobs, images = [], []
  for shape in ((50, 31), (31, 50), (8, 8), (36, 36), (200, 90), (30, 30)):
    images.append(Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)))
    buffer = io.BytesIO()
    images[-1].save(buffer, "PNG")
    blobs.append(buffer.getvalue())
  for name in NAMES:
    tower = ImageTower(str(shared / name.replace(" ", "_")), None, "auto", 4, "float32")
    pixels = tiny_towers.hf_processor(name, *_SIZES[name])(images, return_tensors="np")["pixel_values"]
    wanted = tiny_towers.hf_features(tiny_towers.hf_tower(name), pixels.transpose(0, 2, 3, 1))
    found, reasons = tower.encode(blobs)
    assert reasons == [None] * 6 and tower.dim == wanted.shape[1]
    np.testing.assert_allclose(found.astype(np.float32), wanted, atol=2e-3, rtol=1e-3)


class _Config(dict):
  """The part of a config that finds the tower of queries."""

  def __getattr__(self, name):
    return self[name]


def test_queries_need_the_tower_and_the_processor_of_the_training_data(shared, tmp_path):
  builder = datasets.open_dataset("custom", shared / "data")
  tower = shutil.copytree(shared / "dinov2", tmp_path / "tower")
  prepare_features(builder, tmp_path, str(tower), name="mine")
  origin = image_origin(builder, tmp_path, "mine")
  config = _Config(features=_Config(name="mine", checkpoint="", preprocessing="auto", dim=24))
  assert find_tower(config, origin, None) == (str(tower), None, "processor")
  tiny_towers.change_json(tower / "preprocessor_config.json", resample=2)
  with pytest.raises(InputError, match="is not the tower that made the image features mine"):
    find_tower(config, origin, None)


def test_an_onnx_folder_of_another_tower_than_siglip_takes_feature_vectors(shared, tmp_path, caplog):
  builder = datasets.open_dataset("custom", shared / "data")
  prepare_features(builder, tmp_path, str(shared / "clip"), name="mine")
  config = _Config(features=_Config(name="mine", checkpoint="", preprocessing="auto", dim=24))
  with caplog.at_level(logging.WARNING, "vixml_jax"):
    assert write_onnx_tower(config, image_origin(builder, tmp_path, "mine"), None, tmp_path) is None
  assert "clip: is a CLIP, and only SigLIP towers are written as ONNX; the folder takes feature" in caplog.text
  assert not (tmp_path / "image_tower.onnx").exists()


def _change_tensors(folder, change):
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def _without_processor(folder):
  (folder / "preprocessor_config.json").unlink()


# Name -> tower, change of its folder, further arguments, and parts of the one line on stderr.
_BAD = {
  "unknown model": (
    "dinov2",
    lambda folder: tiny_towers.change_json(folder / "config.json", model_type="vit"),
    [],
    "config.json: model_type is 'vit'; it must be one of siglip, siglip_vision_model, clip, clip_vision_model, dinov2,",
  ),
  "no processor": ("clip", _without_processor, [], "preprocessor_config.json: cannot be read (No such file"),
  "padding": (
    "clip",
    lambda folder: tiny_towers.change_json(folder / "preprocessor_config.json", crop_size=40),
    [],
    "preprocessor_config.json: crop_size 40 is larger than size 36; padding is not supported",
  ),
  "missing tensor": (
    "dinov2",
    lambda folder: _change_tensors(folder, lambda tensors: tensors.pop("layernorm.bias")),
    [],
    "the weights do not fit a dinov2 model of this size: 1 unfilled: -final_norm/bias (from layernorm.bias)",
  ),
  "wrong shape": (
    "clip",
    lambda folder: tiny_towers.change_json(folder / "config.json", patch_size=10),
    [],
    "the weights do not fit a clip_vision_model model of this size: 1 wrong shape: embeddings.patch_embedding.weight",
  ),
  "big_vision": ("clip", None, ["--preprocessing=big_vision"], "preprocessing 'big_vision' is not for CLIP"),
  "variant": ("dinov2", None, ["--variant=siglip_b16_224"], "is a DINOv2, which has no variants"),
}


@pytest.fixture(scope="module")
def results(shared):
  """Name -> exit status, stdout and stderr; each is started as `python -m` does."""
  data = [
    "extract_features",
    "--config=configs/custom.py",
    f"--config.dataset.raw_dir={shared / 'raw'}",
    f"--config.dataset.data_dir={shared / 'data'}",
  ]
  commands = {
    name: [*data, f"--checkpoint={shared / name.replace(' ', '_')}", "--batch_size=16"] for name in ("clip", "dinov2")
  }
  for name, (tower, change, arguments, _) in _BAD.items():
    folder = shared / tower
    if change:
      folder = shutil.copytree(folder, shared / f"bad_{name.replace(' ', '_')}")
      change(folder)
    commands[name] = [*data, f"--checkpoint={folder}", *arguments]
  return run_commands(commands, shared)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_command_makes_features_of_a_folder(results, shared, name):
  status, stdout, stderr = results[name]
  assert (status, stdout) == (0, ""), stderr
  assert len(stderr.splitlines()) == 1 and "images/s" in stderr
  assert (shared / "data" / "custom_features" / name / "1.0.0" / "dataset_info.json").is_file()


@pytest.mark.parametrize("name", _BAD)
def test_bad_folder_is_one_line_and_status_1(results, name):
  status, stdout, stderr = results[name]
  assert status == 1 and not stdout, stderr
  assert len(stderr.splitlines()) == 1 and stderr.startswith("error: ") and _BAD[name][3] in stderr, stderr
