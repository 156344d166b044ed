"""Towers of CLIP and DINOv2 in the format of Hugging Face: features, other image sizes, published sizes, errors."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from tests.helpers import tiny_siglip, tiny_towers
from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.models.parameters import merge_params
from vixml_jax.models.vision import define_vision, feature_size
from vixml_jax.weights import source, tables, vision, vision_config
from vixml_jax.weights.positions import resize_bicubic


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
  """Name -> folder and model."""
  folder = tmp_path_factory.mktemp("towers")
  found = {}
  for name in tiny_towers.TOWERS:
    model, _ = tiny_towers.write_tower(folder / name, name)
    found[name] = folder / name, model
  return found


@pytest.fixture
def copied(towers, tmp_path):
  """Function that copies the folder of a tower, so that it can be changed."""

  def copy(name):
    return shutil.copytree(towers[name][0], tmp_path / name)

  return copy


def _features(params, arguments, pixels):
  graphdef, _, _ = define_vision(arguments)
  return jax.jit(lambda params, pixels: merge_params(graphdef, params)(pixels))(params, pixels)


@pytest.mark.parametrize("name", tiny_towers.TOWERS)
def test_features_equal_those_of_transformers(towers, name):
  folder, model = towers[name]
  params, arguments = vision.load_tower(folder)
  pixels = tiny_siglip.pixels(3, arguments["image_size"])
  wanted = tiny_towers.hf_features(model, pixels)
  found = _features(params, arguments, pixels)
  assert found.shape == (3, tiny_towers.TOWERS[name][1]) == (3, feature_size(arguments))
  np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
  assert np.abs(wanted[0] - wanted[1]).max() > 0.01, "images have different features"
  assert np.abs(np.linalg.norm(found, axis=-1) - 1).min() > 0.1, "features are not normalized"


@pytest.mark.parametrize("size", [24, 27, 56, 70])
@pytest.mark.parametrize("name", ["clip projection", "dinov2", "dinov2 swiglu", "dinov2 registers"])
def test_features_at_another_size_equal_those_of_transformers(towers, name, size):
  folder, model = towers[name]
  params, arguments = vision.load_tower(folder, image_size=size)
  assert arguments["image_size"] == size and params["position_embedding"].shape == (1 + (size // 8) ** 2, 24)
  pixels = tiny_siglip.pixels(2, size)
  wanted = tiny_towers.hf_features(model, pixels)
  np.testing.assert_allclose(_features(params, arguments, pixels), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [1, 3, 7, 16, 36, 38, 60])
def test_positions_are_resized_as_by_torch(grid, antialias):
  positions = np.random.default_rng(0).normal(size=(37**2, 5)).astype(np.float32)
  image = torch.tensor(positions.reshape(1, 37, 37, 5)).permute(0, 3, 1, 2)
  wanted = torch.nn.functional.interpolate(
    image, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias
  )
  found = resize_bicubic(positions, grid, antialias)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, wanted[0].permute(1, 2, 0).reshape(-1, 5), atol=2e-5)


def test_bfloat16_is_near_float32(towers):
  for name in ("clip projection", "dinov2 registers swiglu"):
    params, arguments = vision.load_tower(towers[name][0])
    pixels = tiny_siglip.pixels(8, arguments["image_size"])
    exact, found = (_features(params, arguments | {"dtype": dtype}, pixels) for dtype in ("float32", "bfloat16"))
    assert found.dtype == np.float32 and 1e-4 < np.abs(exact - found).max() < 0.2


# Name on the hub -> what its config.json has, apart from the defaults of transformers.
_VIT_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
_DINO = dict(image_size=518, patch_size=14)
_PUBLISHED = {
  "openai/clip-vit-base-patch32": (transformers.CLIPVisionModel, {}),
  "openai/clip-vit-large-patch14": (transformers.CLIPVisionModel, _VIT_L | {"intermediate_size": 4096}),
  "openai/clip-vit-large-patch14, projected": (
    transformers.CLIPVisionModelWithProjection,
    _VIT_L | {"intermediate_size": 4096, "projection_dim": 768},
  ),
  "facebook/dinov2-small": (transformers.Dinov2Model, _DINO | {"hidden_size": 384, "num_attention_heads": 6}),
  "facebook/dinov2-base": (transformers.Dinov2Model, _DINO),
  "facebook/dinov2-large": (transformers.Dinov2Model, _DINO | _VIT_L),
  "facebook/dinov2-giant": (
    transformers.Dinov2Model,
    _DINO | dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True),
  ),
  "facebook/dinov2-with-registers-base": (transformers.Dinov2WithRegistersModel, _DINO),
}
_MILLIONS = {
  "openai/clip-vit-base-patch32": 87.46,
  "openai/clip-vit-large-patch14": 303.18,
  "openai/clip-vit-large-patch14, projected": 303.97,
  "facebook/dinov2-small": 22.06,
  "facebook/dinov2-base": 86.58,
  "facebook/dinov2-large": 304.37,
  "facebook/dinov2-giant": 1136.48,
  "facebook/dinov2-with-registers-base": 86.58,
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_towers_have_the_size_that_transformers_gives_them(tmp_path, name):
  kind, settings = _PUBLISHED[name]
  config = kind.config_class(**settings)
  config.save_pretrained(tmp_path)
  names = ("visual_projection.weight",) if name.endswith("projected") else ()
  _, arguments = vision_config.read_tower(tmp_path, names)
  _, shapes, axes = define_vision(arguments)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))  # Nothing is allocated.
  found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  with torch.device("meta"):
    theirs = dict(kind(config).named_parameters())
  assert {parameter.device.type for parameter in theirs.values()} == {"meta"}
  assert found == sum(parameter.numel() for name, parameter in theirs.items() if "mask_token" not in name)
  assert round(found / 1e6, 2) == _MILLIONS[name]
  placed = sharding.tree_shardings(sharding.make_mesh(data=2, fsdp=2, tensor=2), shapes, axes)
  kernel = shapes["layers"]["up"]["kernel"].shape
  assert placed["layers"]["up"]["kernel"].shard_shape(kernel) == (kernel[0], kernel[1] // 2, kernel[2] // 2)


def test_clip_large_has_the_published_number_of_parameters(tmp_path):
  kind, settings = _PUBLISHED["openai/clip-vit-large-patch14"]
  kind.config_class(**settings).save_pretrained(tmp_path)
  _, shapes, _ = define_vision(vision_config.read_tower(tmp_path, ())[1])
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 303_179_776


def test_prefixes_and_constants_of_older_folders_are_accepted(towers, copied):
  folder = copied("clip")
  tensors = load_file(folder / "model.safetensors")
  older = {f"vision_model.{name}": value for name, value in tensors.items()}
  older["vision_model.embeddings.position_ids"] = np.arange(10)[None]
  save_file(older, folder / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, vision.load_tower(folder)[0], vision.load_tower(towers["clip"][0])[0])


def test_the_section_of_the_old_name_decides_as_in_transformers(copied):
  folder = copied("clip and text")
  section = json.loads((folder / "config.json").read_text())["vision_config"]
  tiny_towers.change_json(
    folder / "config.json", vision_config_dict=section, vision_config=section | {"hidden_act": "gelu"}
  )
  theirs = transformers.CLIPConfig.from_pretrained(folder).vision_config
  assert theirs.hidden_act == "quick_gelu"
  assert vision.load_tower(folder)[1]["activation"] == "quick_gelu"


def test_values_that_transformers_does_not_write_are_its_defaults(tmp_path):
  for kind, keys in (
    (transformers.CLIPVisionConfig, {"intermediate_size": "mlp_dim"}),
    (transformers.Dinov2Config, {}),
    (transformers.Dinov2WithRegistersConfig, {"num_register_tokens": "num_registers"}),
  ):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind.model_type}))
    _, arguments = vision_config.read_tower(tmp_path, ())
    keys |= {
      "hidden_size": "embed_dim",
      "num_hidden_layers": "num_layers",
      "num_attention_heads": "num_heads",
      "image_size": "image_size",
      "patch_size": "patch_size",
      "layer_norm_eps": "layer_norm_eps",
      "hidden_act": "activation",
    }
    theirs = kind()
    assert {key: getattr(theirs, key) for key in keys} == {key: arguments[ours] for key, ours in keys.items()}


@pytest.mark.parametrize("name", ["clip projection", "dinov2"])
def test_hashes_cover_every_file_that_decides_the_features(towers, name):
  folder, _ = towers[name]
  files = ("config.json", "model.safetensors", "preprocessor_config.json")
  assert vision.checkpoint_hashes(folder) == {file: source.file_hash(folder / file) for file in files}


# Tower, changes of its config.json, and the error.
_CONFIGS = [
  (
    "dinov2",
    {"model_type": "dinov3_vit"},
    r"config\.json: model_type is 'dinov3_vit'; it must be one of siglip, siglip_vision_model, clip, "
    r"clip_vision_model, dinov2, dinov2_with_registers \(the fixed .* NaFlex is not supported\)$",
  ),
  ("dinov2", {"model_type": ["clip"]}, r"model_type is \['clip'\]; it must be one of"),
  (
    "clip",
    {"hidden_act": "relu"},
    "hidden_act is 'relu'; the tower supports only gelu, gelu_pytorch_tanh, quick_gelu:",
  ),
  ("clip", {"num_channels": 4}, "num_channels is 4; the tower supports only 3"),
  ("clip", {"num_attention_heads": 5}, "24 is not divisible by 5 heads"),
  ("clip", {"image_size": None}, "image_size is None; it must be a positive integer"),
  ("clip projection", {"projection_dim": 0}, "projection_dim is 0; it must be a positive integer"),
  ("clip and text", {"vision_config": [1]}, r"vision_config is \[1\]; it must be an object"),
  ("dinov2", {"qkv_bias": False}, "qkv_bias is False; the tower supports only True"),
  ("dinov2", {"mlp_ratio": "4"}, "mlp_ratio is '4'; it must be a positive number"),
  ("dinov2", {"mlp_ratio": 0.01}, "has mlp_dim 0; it must be a positive integer"),
  ("dinov2", {"use_swiglu_ffn": 1}, "use_swiglu_ffn is 1; it must be true or false"),
  ("dinov2 registers", {"num_register_tokens": 0}, "num_register_tokens is 0; it must be a positive integer"),
  # The weights are those of another model than the config says.
  ("dinov2 swiglu", {"use_swiglu_ffn": False}, r"12 unfilled: -layers/down/bias \(from .*mlp\.fc2"),
  ("dinov2 registers", {"model_type": "dinov2"}, r"1 unmapped: \+embeddings\.register_tokens$"),
  ("dinov2", {"model_type": "dinov2_with_registers"}, r"1 unfilled: -registers \(from embeddings\.register_tokens\)$"),
  ("clip", {"image_size": 40}, r"1 wrong shape: .*position_embedding.weight is \[10, 24\], expected \[26, 24\]$"),
  ("clip projection", {"projection_dim": 7}, r"visual_projection\.weight is \[10, 24\], expected \[7, 24\]$"),
]


@pytest.mark.parametrize("name, changes, message", _CONFIGS)
def test_configs_that_do_not_fit_raise_an_error_that_names_the_key(copied, name, changes, message):
  folder = copied(name)
  tiny_towers.change_json(folder / "config.json", **changes)
  with pytest.raises(InputError, match=message) as raised:
    vision.load_tower(folder)
  assert "\n" not in str(raised.value) and str(raised.value).startswith(str(folder))


def test_values_of_any_type_in_a_config_give_arguments_or_one_line(towers, tmp_path):
  odd = [None, True, 0, -1, 0.5, 10**400, 1e300, "x", [], [1], {}, {"height": 1}]
  for name in ("clip", "clip and text", "dinov2", "dinov2 registers"):
    settings = json.loads((towers[name][0] / "config.json").read_text())
    section = settings.get("vision_config", settings)
    refused = 0
    for key, original in list(section.items()):
      for value in odd:
        section[key] = value
        (tmp_path / "config.json").write_text(json.dumps(settings))
        try:
          vision_config.read_tower(tmp_path, (tables.PROJECTION,))
        except InputError as error:
          assert "\n" not in str(error) and str(error).startswith(str(tmp_path))
          refused += 1
      section[key] = original
    assert refused > 60


# Tower, tensor, its new value or None for none, and the error.
_TENSORS = [
  ("clip", "pre_layrnorm.weight", None, r"1 unfilled: -embedding_norm/scale \(from vision_model\.pre_layrnorm\.weight"),
  ("dinov2", "embeddings.cls_token", None, r"1 unfilled: -class_token \(from embeddings\.cls_token\)$"),
  ("dinov2", "encoder.layer.1.layer_scale2.lambda1", None, r"1 unfilled: -layers/mlp_scale \(from .*layer\.1\."),
  ("dinov2", "layernorm.bias", np.zeros(25), r"1 wrong shape: layernorm\.bias is \[25\], expected \[24\]$"),
  (
    "dinov2 swiglu",
    "encoder.layer.0.mlp.weights_in.weight",
    np.zeros((32, 24)),
    r"1 wrong shape: .*weights_in\.weight is \[32, 24\], expected \[64, 24\]$",
  ),
  ("clip", "embeddings.patch_embedding.bias", np.zeros(24), r"1 unmapped: \+embeddings\.patch_embedding\.bias$"),
  ("dinov2", "head.weight", np.zeros(24), r"1 unmapped: \+head\.weight$"),
]


@pytest.mark.parametrize("name, tensor, value, message", _TENSORS)
def test_tensors_that_do_not_fit_are_named(copied, name, tensor, value, message):
  folder = copied(name)
  tensors = load_file(folder / "model.safetensors")
  tensors.pop(tensor, None)
  if value is not None:
    tensors[tensor] = value.astype(np.float32)
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(InputError, match=message):
    vision.load_tower(folder)


def test_a_variant_is_the_name_of_a_siglip(towers):
  for name, family in (("clip", "CLIP"), ("dinov2", "DINOv2")):
    with pytest.raises(InputError, match=rf"is a {family}, which has no variants; leave out variant 'siglip_b16_224'"):
      vision.load_tower(towers[name][0], variant="siglip_b16_224")


def test_pickled_weights_are_not_read(copied):
  folder = copied("dinov2")
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(InputError, match=r"has only pickled weights or other formats \(pytorch_model\.bin\)"):
    vision.load_tower(folder)
