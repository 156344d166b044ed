"""The steps that initialize a run: their order, and the errors that each raises before the next one starts."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.image_features import write_random_features
from tests.helpers.miniature import read_lines, write_lines
from tests.helpers.miniature_runs import load_config, miniature_config
from vixml_jax import datasets, sharding
from vixml_jax.errors import InputError
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.run import configuration
from vixml_jax.run.from_config import check_attention, model_from_config
from vixml_jax.run.setup import set_up_run, write_config
from vixml_jax.run.state import init_params

FEATURES = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Config of a prepared miniature with image features, which reads texts only."""
  folder = tmp_path_factory.mktemp("setup")
  config = miniature_config(folder)
  builder = datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
  write_random_features(builder, config.dataset.data_dir, "random", FEATURES)
  config.features.update(dict(name="random", dim=FEATURES))
  return config


@pytest.fixture
def config(prepared):
  """A copy to change."""
  return prepared.copy_and_resolve_references()


def test_each_step_fails_before_the_next_one_starts(tmp_path):
  config = miniature_config(tmp_path)
  good = config.copy_and_resolve_references()
  config.images = 3
  config.mesh.data = 3
  config.encoder.pretrained = str(tmp_path / "no encoder")
  config.train.row_length = 16  # Too short for a text of 16 tokens and three images.
  config.dataset.raw_dir = str(tmp_path / "no raw folder")
  config.features.update(dict(name="random", dim=FEATURES))
  config.train.free_vectors = 64
  workdir = tmp_path / "run"
  workdir.write_text("a file in the place of the workdir")
  tokens = Path(config.dataset.data_dir) / "tokens"

  def fails_with(message):
    with pytest.raises(InputError, match=message):
      set_up_run(config, workdir, extract=True)

  fails_with("mesh: data x fsdp x tensor = 3 x 1 x 1")
  config.mesh.data = -1
  fails_with("no encoder: ")
  config.encoder.pretrained = good.encoder.pretrained
  fails_with("config.train.row_length=16: an item may have 19 tokens")
  config.train.row_length = good.train.row_length
  fails_with("no raw folder")
  config.dataset.raw_dir = good.dataset.raw_dir
  fails_with("no image features; make them with")
  assert not tokens.exists(), "texts were tokenized before image features were looked for"
  builder = datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
  write_random_features(builder, config.dataset.data_dir, "random", FEATURES)
  fails_with("train.free_vectors=64: 32 give each of the 24 labels its own")
  assert tokens.is_dir()
  config.train.free_vectors = 0
  fails_with("run: cannot be made")
  workdir.unlink()
  setup = set_up_run(config, workdir, extract=True)
  # A quarter of the 24 labels is fewer than the devices that the vectors are split over.
  assert setup.model.shapes["free_vectors"].shape == (8, 32)
  assert setup.config.train.free_vectors == 8
  assert workdir.is_dir() and not (workdir / "config.json").exists(), "it is written when the checkpoint fits"
  write_config(setup, workdir)
  assert configuration.read(workdir / "config.json").train.free_vectors == 8


def test_features_of_another_width_are_refused(config, tmp_path):
  config.images, config.features.dim = 3, 7
  with pytest.raises(InputError, match="config.features.dim=7: the features random of custom have 6; set it to that"):
    set_up_run(config, tmp_path / "run", extract=True)
  assert not (tmp_path / "run").exists()


def test_images_that_leave_no_room_for_the_text_are_refused(config, tmp_path):
  config.images, config.train.row_length = 5, 20
  with pytest.raises(InputError, match="config.train.row_length=20: an item may have 21 tokens .*images=5"):
    set_up_run(config, tmp_path / "run", extract=True)
  assert not (tmp_path / "run").exists()


def test_settings_cannot_be_chosen_on_held_out_queries_if_none_are_held_out(config, tmp_path):
  config.dataset.validation_fraction = 1e-9
  config.eval.retrieval_choose = True
  with pytest.raises(InputError, match="config.dataset.validation_fraction=1e-09: holds out none of the 64"):
    set_up_run(config, tmp_path / "run", extract=True)
  assert not (tmp_path / "run").exists()


def test_test_queries_that_all_lack_labels_are_refused_before_training(tmp_path):
  config = miniature_config(tmp_path)
  path = Path(config.dataset.raw_dir) / "tst.json.gz"
  write_lines(path, [record | {"target_ind": [], "target_rel": []} for record in read_lines(path)])
  with pytest.raises(InputError, match="no test query has a label.*tst.json.gz, or set --config.eval.split=validation"):
    set_up_run(config, tmp_path / "run", extract=True)
  config.eval.split, config.dataset.validation_fraction = "validation", 0.2
  set_up_run(config, tmp_path / "run", extract=True)


def test_missing_adapters_are_refused_before_anything_is_written(tmp_path):
  config = miniature_config(tmp_path, "qwen2.5-0.5b", num_train=16)
  config.encoder.adapter = str(tmp_path / "adapter")
  with pytest.raises(InputError, match="adapter_config.json: cannot be read"):
    train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_an_attention_that_these_devices_lack_is_refused_before_anything_is_read(name, tmp_path):
  config = load_config("custom", "encoder=distilbert")
  config.encoder.attention = name
  with pytest.raises(InputError, match=f"config.encoder.attention '{name}': it needs .* the platform is cpu; use auto"):
    set_up_run(config, tmp_path, extract=False)


@pytest.mark.parametrize("dropout,refused", [(0.1, True), (0.0, False)])
def test_fused_attention_is_refused_if_training_drops_probabilities(dropout, refused):
  config = load_config("custom", "encoder=distilbert")
  config.encoder.update(dict(attention="cudnn", attention_dropout=dropout, dtype="bfloat16"))
  mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), shape=dict(data=1, fsdp=1, tensor=1))
  with pytest.raises(InputError, match="encoder.attention_dropout") if refused else contextlib.nullcontext():
    check_attention(config, mesh)


def test_fused_attention_of_decoders_is_accepted_on_gpus():
  config = load_config("lf_amazon_titles_131k", "encoder=qwen2.5-0.5b")
  config.encoder.attention = "cudnn"
  mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), shape=dict(data=1, fsdp=2, tensor=2))
  check_attention(config, mesh)
  mesh.shape["tensor"] = 4
  with pytest.raises(InputError, match="14 heads cannot be shared evenly by 4 devices"):
    check_attention(config, mesh)


def test_initial_values_of_new_layers(config):
  config.images, config.fusion.residual = 3, 0.4
  for kind in ("fan_in", "torch"):
    config.train.new_init = kind
    model = model_from_config(config)
    params = init_params(model, sharding.make_mesh(), 0)
    maps = [params["prototype"]["layer"][name] for name in ("up", "down")] + [params["fusion"]["project"]]
    for linear in maps:
      bound = len(linear["kernel"]) ** -0.5
      largest = abs(np.asarray(linear["bias"])).max()
      assert (largest == 0) if kind == "fan_in" else (0.5 * bound < largest <= bound), kind
    query = np.asarray(params["prototype"]["layer"]["attention"]["query"]["kernel"])
    bound = {"fan_in": 1.0, "torch": 1.5**0.5}[kind] * len(query) ** -0.5  # Xavier over [3 D, D]: sqrt(6 / (4 D)).
    assert 0.95 * bound < abs(query).max() <= bound, kind
