"""SigLIP checkpoints: both formats in both directions, stacked layers, prefixes, bfloat16, errors, resizing."""

import json
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from tests.helpers import tiny_siglip
from vixml_jax.errors import InputError
from vixml_jax.models.parameters import merge_params
from vixml_jax.models.vision import define_vision
from vixml_jax.weights import engine, hf_folder, positions, siglip, source, tables, vision
from vixml_jax.weights.npz import NpzFile, write_npz


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A folder of a tower of transformers, the tower, and its tensors under the names of big_vision."""
  folder = tmp_path_factory.mktemp("siglip")
  model = tiny_siglip.hf_tower()
  model.save_pretrained(folder)
  return folder, model, {stacked: tiny_siglip.big_vision_tensors(model, stacked) for stacked in (True, False)}


@pytest.fixture
def tensors(published):
  """Tensors of a stacked npz file that can be changed."""
  return dict(published[2][True])


def _assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def _load(tensors, path, **options):
  np.savez(path, **tensors)
  return vision.load_tower(path, **options)


@pytest.mark.parametrize(
  "prefix,stacked", [("", True), ("", False), ("params/", True), ("img/", True), ("params/img/", False)]
)
def test_a_big_vision_file_makes_the_features_of_transformers(published, tmp_path, prefix, stacked):
  folder, model, tensors = published
  named = {f"{prefix}{name}": value for name, value in tensors[stacked].items()}
  params, arguments = _load(named, tmp_path / "tower.npz", image_size=30)
  assert arguments | {"layer_norm_eps": 1e-6} == tiny_siglip.ARGUMENTS
  _assert_equal(params, vision.load_tower(folder)[0])
  if prefix:
    return  # The parameters equal those without a prefix.
  pixels = tiny_siglip.pixels()
  with torch.no_grad():
    wanted = model(torch.tensor(pixels).permute(0, 3, 1, 2)).pooler_output
  graphdef, _, _ = define_vision(arguments)
  found = jax.jit(lambda params, pixels: merge_params(graphdef, params)(pixels))(params, pixels)
  np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_the_text_tower_and_the_loss_of_a_two_tower_file_are_ignored(tensors, tmp_path):
  wanted, _ = _load(tensors, tmp_path / "one.npz")
  both = {f"params/img/{name}": value for name, value in tensors.items()} | {
    "params/txt/Encoder_0/encoderblock/LayerNorm_0/scale": np.ones((2, 4), np.float32),
    "params/txt/head/kernel": np.ones((4, 4), np.float32),
    "params/t": np.ones(1, np.float32),
    "params/b": np.ones(1, np.float32),
  }
  _assert_equal(_load(both, tmp_path / "two.npz")[0], wanted)


def test_a_whole_model_of_transformers_loads_its_vision_tower(published, tmp_path):
  folder, _, _ = published
  tiny_siglip.hf_towers().save_pretrained(tmp_path)
  names = set(load_file(tmp_path / "model.safetensors"))
  assert "vision_model.head.attention.in_proj_weight" in names and "logit_scale" in names
  (params, arguments), (wanted, _) = vision.load_tower(tmp_path), vision.load_tower(folder)
  _assert_equal(params, wanted)
  assert arguments == tiny_siglip.ARGUMENTS


def test_a_config_without_what_equals_the_defaults_means_the_base_tower(tmp_path):
  # As google/siglip2-base-patch16-224 is published.
  settings = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
  (tmp_path / "config.json").write_text(json.dumps(settings))
  save_file({"logit_scale": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
  # It has 208 tensors, two of which are three parameters each.
  with pytest.raises(InputError, match=r"212 unfilled: "):
    vision.load_tower(tmp_path, variant="siglip2_b16_224")


@pytest.mark.parametrize("prefix,stacked", [("params/img/", True), ("params/", False), ("", True)])
def test_npz_to_ours_to_npz_is_the_identity(published, tmp_path, prefix, stacked):
  wanted = {f"{prefix}{name}": value for name, value in published[2][stacked].items()}
  params, _ = _load(wanted, tmp_path / "in.npz")
  siglip.save_npz(params, tmp_path / "new/out.npz", stacked=stacked, prefix=prefix)
  with np.load(tmp_path / "new/out.npz", allow_pickle=False) as found:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
      assert found[name].dtype == np.float32
      np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.npz"]


def test_bf16_is_read_from_raw_bytes_and_written_as_such(tensors, tmp_path):
  half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
  params, _ = _load({name: value.view("V2") for name, value in half.items()}, tmp_path / "in.npz")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
  rounded = {name: value.astype(np.float32) for name, value in half.items()}
  _assert_equal(params, _load(rounded, tmp_path / "f32.npz")[0])
  siglip.save_npz(params, tmp_path / "out.npz", prefix="", dtype="bfloat16")
  with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
    assert set(found) == set(half)
    for name, value in half.items():
      assert found[name].dtype == np.dtype("V2") and found[name].shape == value.shape
      assert found[name].tobytes() == value.tobytes(), name


def test_bf16_parameters_are_saved_as_bf16(published, tmp_path):
  params, _ = vision.load_tower(published[0])
  siglip.save_npz(jax.tree.map(lambda x: jax.numpy.asarray(x, "bfloat16"), params), tmp_path / "bf16.npz")
  siglip.save_npz(params, tmp_path / "cast.npz", dtype="bfloat16")
  assert (tmp_path / "bf16.npz").read_bytes() == (tmp_path / "cast.npz").read_bytes()


def test_huggingface_to_ours_to_huggingface_is_the_identity_and_transformers_loads_it(published, tmp_path):
  folder, model, _ = published
  params, arguments = vision.load_tower(folder)
  siglip.save_siglip(params, tmp_path / "out", arguments)
  before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
  # transformers 5 omits the prefix of published checkpoints.
  assert {name.removeprefix("vision_model.") for name in before} == {
    name.removeprefix("vision_model.") for name in after
  }
  assert all(name.startswith("vision_model.") for name in after)
  for name, value in before.items():
    np.testing.assert_array_equal(after[f"vision_model.{name.removeprefix('vision_model.')}"], value, strict=True)
  again, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert type(again) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
  pixels = torch.tensor(tiny_siglip.pixels()).permute(0, 3, 1, 2)
  with torch.no_grad():
    assert torch.equal(again.eval()(pixels).pooler_output, model(pixels).pooler_output)
  _assert_equal(vision.load_tower(tmp_path / "out"), vision.load_tower(folder))


def test_big_vision_becomes_huggingface_and_back(published, tensors, tmp_path):
  params, arguments = _load(tensors, tmp_path / "in.npz", image_size=30)
  siglip.save_siglip(params, tmp_path / "folder", arguments)
  _assert_equal(vision.load_tower(tmp_path / "folder")[0], vision.load_tower(published[0])[0])
  siglip.save_npz(vision.load_tower(tmp_path / "folder")[0], tmp_path / "out.npz", prefix="")
  with np.load(tmp_path / "out.npz") as found:
    _assert_equal({name: found[name] for name in found}, tensors)


def test_saving_parameters_that_are_no_tower_raises_an_error(published, tmp_path):
  params, arguments = vision.load_tower(published[0])
  del params["head"]["attention"]["key"]["bias"]
  with pytest.raises(InputError, match=r"1 unfilled: -head/attention/key/bias$"):
    siglip.save_npz(params, tmp_path / "out.npz")
  with pytest.raises(InputError, match=r"1 unfilled: -head/attention/key/bias$"):
    siglip.save_siglip(params, tmp_path / "out", arguments)
  assert not list(tmp_path.iterdir())


def test_unmapped_tensors_are_listed(tensors, tmp_path):
  tensors["params/img/head/kernel"] = np.zeros((2, 2), np.float32)
  with pytest.raises(InputError, match=r"tower\.npz: .*1 unmapped: \+params/img/head/kernel$"):
    _load(tensors, tmp_path / "tower.npz")


def test_unfilled_parameters_are_listed(tensors, tmp_path):
  del tensors["Transformer/encoder_norm/bias"]
  with pytest.raises(InputError, match=r"1 unfilled: -final_norm/bias \(from Transformer/encoder_norm/bias\)$"):
    _load(tensors, tmp_path / "tower.npz")


def test_a_missing_layer_is_unfilled(published, tmp_path):
  tensors = {name: value for name, value in published[2][False].items() if "encoderblock_1/" not in name}
  with pytest.raises(InputError, match=r"16 unfilled: -layers/.* \(from Transformer/encoderblock_1/"):
    _load(tensors, tmp_path / "tower.npz")


def test_layers_stored_in_both_ways_are_unmapped(published, tmp_path):
  with pytest.raises(InputError, match=r"16 unmapped: \+Transformer/encoderblock/"):
    _load(published[2][True] | published[2][False], tmp_path / "tower.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_are_listed_whether_by_prefix_or_in_the_archive(tensors, tmp_path):
  name = "Transformer/encoder_norm/bias"
  with pytest.raises(InputError, match=rf"1 duplicate: .*{name}$"):
    _load(tensors | {f"params/img/{name}": tensors[name]}, tmp_path / "prefix.npz")
  np.savez(tmp_path / "twice.npz", **tensors)
  np.savez(tmp_path / "one.npz", **{name: tensors[name]})
  with zipfile.ZipFile(tmp_path / "twice.npz", "a") as archive, zipfile.ZipFile(tmp_path / "one.npz") as one:
    archive.writestr(f"{name}.npy", one.read(f"{name}.npy"))
  with pytest.raises(InputError, match=rf"1 duplicate: {name}$"):
    vision.load_tower(tmp_path / "twice.npz")


def test_wrong_shapes_are_listed_with_both_shapes(tensors, tmp_path):
  name = "Transformer/encoderblock/MlpBlock_0/Dense_1/kernel"
  tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
  with pytest.raises(InputError, match=rf"1 wrong shape: {name} is \[3, 24, 40\], expected \[3, 40, 24\]$"):
    _load(tensors, tmp_path / "tower.npz")


def test_a_fused_tensor_of_the_wrong_shape_is_listed_once(published, tmp_path):
  folder, _, _ = published
  tensors = load_file(folder / "model.safetensors")
  tensors["head.attention.in_proj_weight"] = np.zeros((48, 24), np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  with pytest.raises(InputError, match=r"size: 1 wrong shape: .*in_proj_weight is \[48, 24\], expected \[72, 24\]$"):
    vision.load_tower(tmp_path)


def test_a_part_of_a_tensor_that_no_rule_reads_is_unmapped(published):
  folder, _, _ = published
  params, _ = vision.load_tower(folder)
  rules = tuple(rule for rule in tables.SIGLIP.rules if rule.ours != "head/attention/value/kernel")
  table = tables.Table("siglip", rules, tables.SIGLIP.ignored, renamed=tables.SIGLIP.renamed)
  del params["head"]["attention"]["value"]["kernel"]
  with pytest.raises(InputError, match=r"1 unmapped: \+vision_model\.head\.attention\.in_proj_weight \(part 3 of 3\)$"):
    engine.apply(table, hf_folder.SafetensorsFolder(folder), params)


def test_two_rules_for_one_part_are_a_duplicate(published):
  folder, _, _ = published
  params, _ = vision.load_tower(folder)
  again = next(rule for rule in tables.SIGLIP.rules if rule.part == (1, 3))
  table = tables.Table("siglip", (*tables.SIGLIP.rules, again), tables.SIGLIP.ignored, renamed=tables.SIGLIP.renamed)
  with pytest.raises(InputError, match=r"2 duplicate: head/attention/key/kernel, vision_model\..*in_proj_weight$"):
    engine.apply(table, hf_folder.SafetensorsFolder(folder), params)


@pytest.mark.parametrize(
  "name,change,message",
  [
    ("embedding/kernel", None, "has no tensor embedding/kernel; give a file with a SigLIP image tower"),
    ("pos_embedding", np.zeros((9, 24), np.float32), r"has a tensor of shape \[9, 24\] for pos_embedding"),
    ("pos_embedding", np.zeros((1, 10, 24), np.float32), "10 positions are not a square"),
    (
      "MAPHead_0/MultiHeadDotProductAttention_0/query/kernel",
      np.zeros((24, 5, 5), np.float32),
      "a width of 24 is not divisible by 5 heads",
    ),
    ("embedding/kernel", np.zeros((0, 8, 3, 24), np.float32), "has .*patch_size 0; it must be a positive integer"),
  ],
)
def test_files_without_a_tower_raise_an_error_that_names_the_tensor(tensors, tmp_path, name, change, message):
  tensors = {key: value for key, value in tensors.items() if key != name} | ({} if change is None else {name: change})
  with pytest.raises(InputError, match=rf"tower\.npz: {message}"):
    _load(tensors, tmp_path / "tower.npz")


@pytest.mark.parametrize(
  "change,message",
  [
    ({"model_type": "siglip2_vision_model"}, "model_type is 'siglip2_vision_model'.*NaFlex"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the tower supports only 'gelu_pytorch_tanh'"),
    ({"vision_use_head": False}, "vision_use_head is False"),
    ({"num_channels": 4}, "num_channels is 4"),
    ({"num_attention_heads": 5}, "24 is not divisible by 5 heads"),
    ({"image_size": [30, 30]}, r"image_size is \[30, 30\]; it must be a positive integer"),
    ({"image_size": 7}, "7 pixels are smaller than a patch of 8"),
  ],
)
def test_unsupported_configs_raise_an_error_that_names_the_key(published, tmp_path, change, message):
  folder, _, _ = published
  settings = json.loads((folder / "config.json").read_text()) | change
  (tmp_path / "config.json").write_text(json.dumps(settings))
  (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
  with pytest.raises(InputError, match=message):
    vision.load_tower(tmp_path)


def test_pickled_damaged_and_missing_files_raise_an_error_that_names_them(tensors, tmp_path):
  file = tmp_path / "tower.npz"
  with pytest.raises(InputError, match=r"tower\.npz: no such file"):
    vision.load_tower(file)
  name = "Transformer/encoder_norm/bias"
  np.savez(file, **(tensors | {name: np.array([{}] * 24, object)}))
  with pytest.raises(InputError, match=rf"tower\.npz: is not a complete npz file of plain arrays \(tensor {name}\)"):
    vision.load_tower(file)
  with pytest.raises(InputError, match=rf"tensor {name} is float64; it must be float32, float16 or bfloat16"):
    _load(tensors | {name: np.zeros(24)}, file)
  content = file.read_bytes()
  file.write_bytes(content[:2000])
  with pytest.raises(InputError, match=r"tower\.npz: is not a complete npz file"):
    vision.load_tower(file)
  value = tensors["pos_embedding"].tobytes()
  assert content.count(value) == 1
  file.write_bytes(content.replace(value, value[::-1]))
  with pytest.raises(InputError, match=r"\(tensor pos_embedding\).*CRC"):
    vision.load_tower(file)


def test_shapes_are_known_without_reading_and_tensors_are_read_one_at_a_time(tensors, tmp_path, monkeypatch):
  np.savez_compressed(tmp_path / "tower.npz", **tensors)
  file = NpzFile(tmp_path / "tower.npz")
  assert sorted(file.names()) == sorted(tensors)
  monkeypatch.setattr(np.lib.format, "read_array", None)
  assert {name: file.shape(name) for name in file.names()} == {name: value.shape for name, value in tensors.items()}
  monkeypatch.undo()
  np.testing.assert_array_equal(file.read("pos_embedding"), tensors["pos_embedding"])


def test_the_same_tensors_make_the_same_file(tensors, tmp_path):
  for name in ("one.npz", "other.npz"):
    write_npz(tensors, tmp_path / name)
  one, other = (vision.checkpoint_hashes(tmp_path / name) for name in ("one.npz", "other.npz"))
  assert one == {"one.npz": source.file_hash(tmp_path / "one.npz")} and [*one.values()] == [*other.values()]


def test_a_folders_hashes_are_those_of_its_safetensors(published):
  folder, _, _ = published
  assert vision.checkpoint_hashes(folder) == {"model.safetensors": source.file_hash(folder / "model.safetensors")}


class _Published:
  """Names and shapes of big_vision's So400m/14@384 file, without its values."""

  name = "so400m.npz"

  def __init__(self):
    attention = {
      **{f"{part}/kernel": (1152, 16, 72) for part in ("query", "key", "value")},
      **{f"{part}/bias": (16, 72) for part in ("query", "key", "value")},
      "out/kernel": (16, 72, 1152),
      "out/bias": (1152,),
    }
    mlp = {
      "Dense_0/kernel": (1152, 4304),
      "Dense_0/bias": (4304,),
      "Dense_1/kernel": (4304, 1152),
      "Dense_1/bias": (1152,),
    }
    norm = {"scale": (1152,), "bias": (1152,)}
    shared = {
      **{f"MultiHeadDotProductAttention_0/{name}": shape for name, shape in attention.items()},
      **{f"MlpBlock_0/{name}": shape for name, shape in mlp.items()},
      **{f"LayerNorm_0/{name}": shape for name, shape in norm.items()},
    }
    block = shared | {f"LayerNorm_1/{name}": shape for name, shape in norm.items()}
    self.shapes = {
      f"params/img/{name}": shape
      for name, shape in {
        "embedding/kernel": (14, 14, 3, 1152),
        "embedding/bias": (1152,),
        "pos_embedding": (1, 729, 1152),
        **{f"Transformer/encoderblock/{name}": (27, *shape) for name, shape in block.items()},
        **{f"Transformer/encoder_norm/{name}": shape for name, shape in norm.items()},
        "MAPHead_0/probe": (1, 1, 1152),
        **{f"MAPHead_0/{name}": shape for name, shape in shared.items()},
      }.items()
    } | {"params/t": (1,), "params/b": (1,), "params/txt/head/bias": (1152,)}

  def names(self):
    return list(self.shapes)

  def shape(self, name):
    return self.shapes[name]

  def read(self, name):
    raise _Fits(name)


class _Fits(Exception):
  """Raised by the first read: all names and shapes fit."""


def test_the_published_so400m_at_384_is_recognized_and_fits_to_the_last_tensor():
  published = _Published()
  arguments, table = siglip.npz_arguments(published)
  assert arguments == siglip.siglip_arguments("siglip2_so400m14_384")  # 384 pixels, although 27 patches are 378.
  with pytest.raises(_Fits):
    engine.apply(table, published, define_vision(arguments)[1])
  published.shapes["params/img/MAPHead_0/probe"] = (1, 1152)
  with pytest.raises(InputError, match="1 wrong shape: params/img/MAPHead_0/probe"):
    engine.apply(table, published, define_vision(arguments)[1])


def test_a_variant_is_checked_against_the_checkpoint(published, tensors, tmp_path):
  with pytest.raises(InputError, match=r"is not siglip2_b16_224: it has .*patch_size 8 \(not 16\).*embed_dim 24"):
    _load(tensors, tmp_path / "tower.npz", variant="siglip2_b16_224")
  with pytest.raises(InputError, match="is not siglip2_so400m14_384"):
    vision.load_tower(published[0], variant="siglip2_so400m14_384")
  with pytest.raises(InputError, match="variant 'so400m' is not known; it must be one of siglip2_b32_256, "):
    vision.load_tower(published[0], variant="so400m")


def test_the_name_of_a_variant_is_resolved_on_the_hub(monkeypatch, published):
  asked = []

  def fetch(name, **_):
    asked.append(name)
    return str(published[0])

  monkeypatch.setattr(source, "snapshot_download", fetch)
  assert vision.load_tower("siglip2_g-opt16_384")[1] == tiny_siglip.ARGUMENTS
  assert asked == ["google/siglip2-giant-opt-patch16-384"]


def _bilinear(grid, size):
  """Bilinear interpolation with fixed corners: first along columns, then along rows."""
  places = np.linspace(0, len(grid) - 1, size)
  rows = np.stack(
    [
      np.stack(
        [np.interp(places, np.arange(len(grid)), grid[:, column, channel]) for channel in range(grid.shape[2])], -1
      )
      for column in range(grid.shape[1])
    ],
    1,
  )
  return np.stack(
    [
      np.stack([np.interp(places, np.arange(len(grid)), row[:, channel]) for channel in range(grid.shape[2])], -1)
      for row in rows
    ]
  )


@pytest.mark.parametrize("size", [2, 5, 8])
def test_positions_are_resized_as_by_hand_and_as_by_torch(size):
  grid = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
  found = positions.resize_bilinear(grid.reshape(16, 3), size)
  assert found.shape == (size**2, 3) and found.dtype == np.float32
  np.testing.assert_allclose(found, _bilinear(grid, size).reshape(-1, 3), atol=1e-6)
  wanted = torch.nn.functional.interpolate(
    torch.tensor(grid).permute(2, 0, 1)[None], size=(size, size), mode="bilinear", align_corners=True
  )
  np.testing.assert_allclose(found, wanted[0].permute(1, 2, 0).reshape(-1, 3), atol=1e-5)


def test_a_tower_loads_at_another_resolution(published, tensors, tmp_path):
  params, arguments = _load(tensors, tmp_path / "tower.npz", image_size=47)
  own, _ = vision.load_tower(tmp_path / "tower.npz")
  assert arguments["image_size"] == 47 and params["position_embedding"].shape == (25, 24)
  np.testing.assert_array_equal(params["position_embedding"][[0, 4, 20, 24]], own["position_embedding"][[0, 2, 6, 8]])
  graphdef, shapes, _ = define_vision(arguments)
  assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
  features = jax.jit(lambda params, pixels: merge_params(graphdef, params)(pixels))(params, tiny_siglip.pixels(2, 47))
  assert features.shape == (2, 24) and np.isfinite(features).all()
  _assert_equal(vision.load_tower(published[0], image_size=47)[0], params)
  with pytest.raises(InputError, match="7 pixels are smaller than a patch of 8"):
    vision.load_tower(tmp_path / "tower.npz", image_size=7)
