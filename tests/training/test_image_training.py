"""Training and evaluation with images on a miniature: outputs, devices, where the bank lies, resuming, bad input."""

import json

import jax
import numpy as np
import pytest

from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import (
  assert_close,
  assert_stopped_and_started_again_ends_with_the_same_bits,
  loss_and_gradients,
)
from vixml_jax import datasets, sharding
from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.run import configuration
from vixml_jax.run.from_config import set_up

DIM = 6


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
  """A prepared miniature with random image features, and its config."""
  folder = tmp_path_factory.mktemp("images")
  config = miniature_config(folder)
  builder = datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
  write_random_features(builder, config.dataset.data_dir, "random", DIM)
  config.images = 3
  config.features.update(dict(name="random", dim=DIM))
  config.fusion.modality_dropout = 0.2
  return config


@pytest.fixture
def config(workplace):
  """A copy to change."""
  return workplace.copy_and_resolve_references()


def test_a_run_with_images_writes_the_table_of_fewer_test_images(config, tmp_path, capsys):
  config.eval.test_images = (0, 1, 3)
  configuration.check(config)
  final = train_and_evaluate(config, tmp_path)
  by_images = json.loads((tmp_path / "evaluation.json").read_text())["by_test_images"]
  assert list(by_images) == ["0", "1", "3"]
  printed = capsys.readouterr().out
  assert "at most 0 images a query" in printed and "at most 3 images a query + retrieval" in printed
  # All images that there are: the run's own numbers.
  metrics = by_images["3"]["metrics"]
  assert {key: metrics[key] for key in metrics if "@" in key} == {key: final[key] for key in metrics if "@" in key}
  assert by_images["0"]["metrics"] != metrics


def test_evaluating_again_can_drop_images_and_gives_the_same_numbers(config, tmp_path):
  config.train.epochs = 1
  trained = train_and_evaluate(config, tmp_path)
  again = configuration.read(tmp_path / "config.json")
  again.eval.test_images = (0,)
  again.features.checkpoint = "elsewhere.npz"  # Evaluation needs the features, not the tower.
  evaluated = evaluate_workdir(again, tmp_path)
  assert configuration.read(tmp_path / "config.json").features.checkpoint == "elsewhere.npz"
  assert {k: v for k, v in trained.items() if "@" in k} == {k: v for k, v in evaluated.items() if "@" in k}
  assert list(json.loads((tmp_path / "evaluation.json").read_text())["by_test_images"]) == ["0"]


@pytest.mark.parametrize(
  "method,adapter,mesh,where",
  [("early", "gated", dict(data=2, fsdp=2, tensor=2), "device"), ("late", "mlp", dict(data=8), "host")],
)
def test_eight_devices_and_either_place_of_the_bank_give_the_loss_and_gradients_of_one(
  config, tmp_path, method, adapter, mesh, where
):
  config.fusion.update(dict(method=method, adapter=adapter, bank="host"))
  run = set_up(config, tmp_path)
  results = [
    loss_and_gradients(run, on, run.bank.placed(on, place))
    for on, place in (
      (sharding.make_mesh(devices=jax.devices()[:1]), "host"),
      (sharding.make_mesh(**(dict(data=1) | mesh)), where),
    )
  ]
  assert_close(*results)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(results[0][2]["fusion"]["project"]))


@pytest.mark.parametrize(
  "template,fusion", [("E V", dict(adapter="mlp", residual=0.3)), ("V E", dict(method="late", adapter="gated"))]
)
def test_every_kind_of_fusion_trains_and_evaluates(config, tmp_path, template, fusion):
  config.prompt.template = template
  config.fusion.update(fusion)
  config.train.epochs = 1
  configuration.check(config)
  final = train_and_evaluate(config, tmp_path)
  assert all(np.isfinite(value) for key, value in final.items() if "@" in key)


@pytest.mark.slow
def test_stopped_and_started_again_a_run_with_images_ends_with_the_same_bits(config, tmp_path, monkeypatch):
  config.train.epochs = 2
  assert_stopped_and_started_again_ends_with_the_same_bits(config, tmp_path, monkeypatch)


@pytest.mark.parametrize(
  "change,message",
  [
    ({"images": 6}, "config.images=6: must be 0 to 5"),
    ({"images": 0, "eval.test_images": (0, 1)}, "this model takes no images"),
    ({"eval.test_images": (-1,)}, "numbers of images, 0 or more"),
    ({"fusion.method": "middle"}, "must be one of early, late"),
    ({"fusion.adapter": "conv"}, "must be one of linear, mlp, gated"),
    ({"fusion.residual": 0.3, "fusion.method": "late"}, "config.fusion.residual=0.3: belongs to early fusion"),
    ({"prompt.template": "E"}, "no place for the images"),
    ({"fusion.bank": "disk"}, "must be one of auto, device, host"),
    ({"fusion.modality_dropout": 1.5}, "between 0 and 1"),
  ],
)
def test_bad_image_settings_are_refused_by_key(config, change, message):
  config.update_from_flattened_dict(change)
  with pytest.raises(InputError, match=message):
    configuration.check(config)


def test_images_that_leave_no_room_for_the_text_are_refused_before_training(config, tmp_path):
  config.images, config.train.row_length = 5, 20
  with pytest.raises(InputError, match="config.train.row_length=20: an item may have 21 tokens .*images=5"):
    train_and_evaluate(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_features_that_are_missing_or_of_another_width_are_refused_before_training(config, tmp_path):
  config.features.dim = 7
  with pytest.raises(InputError, match="config.features.dim=7: the features random of custom have 6; set it to that"):
    train_and_evaluate(config, tmp_path)
  config.features.name = "others"
  with pytest.raises(InputError, match="others.* no image features; make them with"):
    train_and_evaluate(config, tmp_path)
  assert not list(tmp_path.iterdir())
