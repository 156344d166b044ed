"""Images are prepared as the image processors of CLIP and DINOv2 in transformers do, by their own file."""

import json

import numpy as np
from PIL import Image
import pytest
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.helpers import tiny_siglip, tiny_towers
from vixml_jax.errors import InputError
from vixml_jax.images.preprocess import AUTO, KINDS, PREPROCESSING, PROCESSOR
from vixml_jax.images.processor import choose_preprocessing, read_processor

SHAPES = [(1, 1), (5, 3), (40, 40), (64, 48), (48, 64), (37, 90), (91, 40), (333, 641), (641, 333), (30, 400)]


def pixels_of(shape):
  return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


def written(folder, **settings):
  """Writes a preprocessor_config.json and reads it."""
  (folder / "preprocessor_config.json").write_text(json.dumps(settings))
  return read_processor(folder)


def normalized(processor, pixels):
  return (processor(pixels).astype(np.float32) / 255 - np.float32(processor.mean)) / np.float32(processor.std)


# Settings of a processor, and what they are called in the files of older versions.
_SETTINGS = {
  "as published with CLIP": (CLIPImageProcessorPil, {"size": {"shortest_edge": 24}, "crop_size": 24}),
  "as published with DINOv2": (
    BitImageProcessorPil,
    {
      "size": {"shortest_edge": 28},
      "crop_size": {"height": 24, "width": 24},
      "image_mean": [0.485, 0.456, 0.406],
      "image_std": [0.229, 0.224, 0.225],
    },
  ),
  "odd sizes": (CLIPImageProcessorPil, {"size": {"shortest_edge": 33}, "crop_size": {"height": 24, "width": 24}}),
  "bilinear": (BitImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_size": 24, "resample": 2}),
  "lanczos": (BitImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_size": 24, "resample": 1}),
  "not in proportion": (CLIPImageProcessorPil, {"size": {"height": 28, "width": 28}, "crop_size": 24}),
  "one number for all colors": (
    CLIPImageProcessorPil,
    {"size": {"shortest_edge": 24}, "crop_size": 24, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]},
  ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", _SETTINGS)
def test_pixels_are_those_of_the_processor_of_transformers(tmp_path, name, shape):
  kind, settings = _SETTINGS[name]
  theirs = kind(**settings)
  theirs.save_pretrained(tmp_path)
  ours = read_processor(tmp_path)
  wanted = theirs(Image.fromarray(pixels_of(shape)), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  found = normalized(ours, pixels_of(shape))
  assert ours.size == 24 and found.shape == (24, 24, 3)
  np.testing.assert_allclose(found, wanted, atol=2e-6)  # Far below 1/255: not one pixel is rounded in another way.


def test_files_of_older_versions_mean_the_same(tmp_path):
  wanted = read_folder(tmp_path / "new", CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=24))
  old = {
    "feature_extractor_type": "CLIPFeatureExtractor",
    "crop_size": 24,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 28,
  }
  assert written(tmp_path, **old) == wanted
  assert written(tmp_path, image_processor_type="CLIPImageProcessorFast", size=28, crop_size=24, do_pad=None) == wanted
  assert written(tmp_path, image_processor_type="BitImageProcessor", size=28, crop_size=24) == wanted
  assert written(tmp_path, size=28, crop_size=24, image_mean=0.5, image_std=0.25).mean == (0.5, 0.5, 0.5)


def read_folder(folder, processor):
  processor.save_pretrained(folder)
  return read_processor(folder)


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, BitImageProcessorPil])
def test_absent_keys_have_the_defaults_of_transformers(tmp_path, kind):
  wanted = read_folder(tmp_path, kind())
  assert written(tmp_path, image_processor_type=kind.__name__.removesuffix("Pil")) == wanted


@pytest.mark.parametrize("shape", [(1, 3_000_000), (3_000_000, 1), (7, 700), (900, 20)])
def test_a_strip_becomes_its_middle_and_takes_little_memory(tmp_path, shape):
  ours = written(tmp_path, size=24, crop_size=24)
  line = np.linspace(0, 255, max(shape)).astype(np.uint8)
  pixels = np.broadcast_to(line[:, None, None] if shape[0] > shape[1] else line[None, :, None], (*shape, 3))
  found = ours(np.ascontiguousarray(pixels))
  assert found.shape == (24, 24, 3)
  if max(shape) < 1000:
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24, do_normalize=False, do_rescale=False)
    wanted = theirs(Image.fromarray(np.ascontiguousarray(pixels)), return_tensors="np")["pixel_values"][0]
    assert np.abs(found.astype(int) - wanted.transpose(1, 2, 0)).max() <= 1
  else:
    assert np.abs(found.astype(int) - 127).max() <= 1


@pytest.mark.parametrize(
  "settings, message",
  [
    (
      {"image_processor_type": "ViTImageProcessor"},
      "image_processor_type is 'ViTImageProcessor'; it must be one of CLIP",
    ),
    ({"image_processor_type": 3}, "image_processor_type is 3; it must be one of"),
    ({"do_resize": False}, "do_resize is False; only True is supported"),
    ({"do_center_crop": False}, "do_center_crop is False; only True is supported"),
    ({"do_rescale": False}, "do_rescale is False; only True is supported"),
    ({"do_normalize": False}, "do_normalize is False; only True is supported"),
    ({"do_pad": True}, "do_pad is True; only False is supported"),
    ({"rescale_factor": 1 / 127.5}, r"rescale_factor is 0\.0078.*; only 1/255 is supported"),
    ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'; only 1/255 is supported"),
    ({"resample": 99}, "resample is 99; it must be the number of a filter of Pillow"),
    ({"resample": "bicubic"}, "resample is 'bicubic'; it must be the number of a filter"),
    ({"size": {"shortest_edge": 224, "longest_edge": 500}}, r"size is \{.*\}; it must be shortest_edge, or an equal"),
    (
      {"size": {"height": 224, "width": 225}},
      r"size is \{.*\}; it must be shortest_edge, or an equal height and width",
    ),
    ({"size": {"shortest_edge": 0}}, "size is 0; it must be shortest_edge"),
    ({"size": 10**9}, "size is 1000000000; it must be .* of at most 4096 pixels"),
    ({"size": "224"}, "size is '224'; it must be"),
    ({"crop_size": {"height": 224, "width": 336}}, r"crop_size is \{.*\}; it must be an equal height and width"),
    ({"crop_size": {"shortest_edge": 224}}, r"crop_size is \{.*\}; it must be an equal height and width"),
    ({"crop_size": 256}, "crop_size 256 is larger than size 224; padding is not supported"),
    ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0\.5, 0\.5\]; it must be three numbers"),
    ({"image_mean": [0.5, 0.5, "0.5"]}, "image_mean is .*; it must be three numbers"),
    ({"image_std": [0.5, 0, 0.5]}, r"image_std is \[0\.5, 0\.0, 0\.5\]; it must be at least 0.001"),
    ({"image_std": [1e999] * 3}, "image_std is .*; it must be three numbers"),
  ],
)
def test_what_is_not_supported_is_refused_by_key(tmp_path, settings, message):
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps({"size": 224, "crop_size": 224} | settings))
  with pytest.raises(InputError, match=message) as raised:
    read_processor(tmp_path)
  assert "\n" not in str(raised.value) and str(raised.value).startswith(f"{path}: ")


def test_missing_and_damaged_files_are_named(tmp_path):
  with pytest.raises(InputError, match=r"preprocessor_config\.json: cannot be read .*; fetch it, or save the image"):
    read_processor(tmp_path)
  (tmp_path / "preprocessor_config.json").write_text("{")
  with pytest.raises(InputError, match=r"preprocessor_config\.json: is not JSON .*; fetch it again"):
    read_processor(tmp_path)


def test_values_of_any_type_give_a_processor_or_one_line(tmp_path):
  path = tmp_path / "preprocessor_config.json"
  default = json.loads(CLIPImageProcessorPil().to_json_string())
  odd = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    1e300,
    10**400,
    "x",
    "",
    [],
    [1],
    {},
    {"height": 1},
    [[0.5]] * 3,
    "NaN",
    "1e999",
  ]
  refused = 0
  for key in (*default, "do_pad", "feature_extractor_type"):
    for value in odd:
      text = json.dumps(default | {key: "?"}).replace('"?"', value if value in ("NaN", "1e999") else json.dumps(value))
      path.write_text(text)
      try:
        size = read_processor(tmp_path).size
        assert type(size) is int and 1 <= size <= 4096
      except InputError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
        refused += 1
  assert refused > 100


def test_the_family_of_the_tower_decides_the_way(tmp_path):
  folders = {"siglip": tmp_path / "siglip", "CLIP": tmp_path / "clip", "DINOv2": tmp_path / "dinov2"}
  tiny_siglip.hf_tower().save_pretrained(folders["siglip"])
  tiny_towers.write_tower(folders["CLIP"], "clip")
  tiny_towers.write_tower(folders["DINOv2"], "dinov2")
  assert choose_preprocessing(AUTO, tmp_path / "tower.npz") == "big_vision"
  assert [choose_preprocessing(AUTO, folder) for folder in folders.values()] == ["big_vision", PROCESSOR, PROCESSOR]
  for name in PREPROCESSING:
    assert choose_preprocessing(name, folders["siglip"]) == name
    for family in ("CLIP", "DINOv2"):
      with pytest.raises(InputError, match=rf"preprocessing '{name}' is not for {family}; set it to processor, or to"):
        choose_preprocessing(name, folders[family])
  with pytest.raises(InputError, match="preprocessing 'processor' is not for SigLIP; set it to big_vision or huggingf"):
    choose_preprocessing(PROCESSOR, folders["siglip"])
  with pytest.raises(InputError, match=f"unknown preprocessing 'crop'; choose from {', '.join(KINDS)}"):
    choose_preprocessing("crop", folders["siglip"])
