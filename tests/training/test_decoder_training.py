"""Decoders trained with adapters around a frozen base: learning, interrupted runs, variants, the hash of the base."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import (
  assert_sigterm_changes_no_bit,
  assert_two_processes_train_like_one,
  final_state,
  metrics_of,
)
from vixml_jax import datasets
from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.run import configuration
from vixml_jax.run.pretrained import trainable_params
from vixml_jax.run.setup import set_up_run
from vixml_jax.weights import engine

FEATURES = 6
EPOCHS = 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Config of a finished run of a tiny Qwen2 on texts, its workdir and its metrics."""
  folder = tmp_path_factory.mktemp("decoder")
  config = miniature_config(folder, "qwen2.5-0.5b")
  builder = datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
  write_random_features(builder, config.dataset.data_dir, "random", FEATURES)
  config.features.update(dict(name="random", dim=FEATURES))
  config.train.update(dict(epochs=EPOCHS, learning_rate=1e-2))
  return config, folder / "run", train_and_evaluate(config, folder / "run")


@pytest.fixture
def config(finished):
  """A copy to change."""
  return finished[0].copy_and_resolve_references()


def use_images(config):
  config.images = 3
  config.fusion.modality_dropout = 0.2
  return config


def test_adapters_learn(finished):
  _, workdir, final = finished
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  losses = [line["values"]["mean_loss"] for line in lines if line["split"] == "epoch"]
  assert len(losses) == EPOCHS and min(losses) < 0.92 * losses[0]
  assert final["P@1"] > 40  # By chance 1 in 24.


def test_a_checkpoint_has_trained_adapters_and_no_base(finished, tmp_path):
  config, workdir, _ = finished
  state = final_state(config, workdir)
  trained = {name.rpartition("/")[2] for name in engine.flatten_tree(state.params["encoder"])}
  assert trained == {"lora_a", "lora_b"} and state.params.keys() == {"encoder", "free_vectors", "prototype"}
  setup = set_up_run(config, tmp_path, extract=True)
  initial = trainable_params(setup.model, setup.mesh, config.seed, setup.weights_folder)
  for name, value in engine.flatten_tree(initial).items():
    assert not np.array_equal(engine.flatten_tree(state.params)[name], value), f"{name} was not trained"


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_continues_to_the_same_bits(finished, config, tmp_path, monkeypatch):
  assert_sigterm_changes_no_bit(config, finished[1], tmp_path, monkeypatch)


def test_a_run_is_refused_with_another_base_and_evaluated_with_a_moved_one(finished, config, tmp_path):
  workdir = shutil.copytree(finished[1], tmp_path / "run")
  first = config.encoder.pretrained
  shutil.copytree(first, tmp_path / "moved")
  shutil.copytree(first, tmp_path / "other")
  tensors = load_file(tmp_path / "other" / "model.safetensors")
  tensors["norm.weight"] = tensors["norm.weight"] + 1
  save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
  config.encoder.pretrained = str(tmp_path / "other")
  for start in (train_and_evaluate, evaluate_workdir):
    with pytest.raises(InputError, match=f"{tmp_path / 'other'}: model.safetensors has sha256 .* {first} with"):
      start(config, workdir)
  config.encoder.pretrained = str(tmp_path / "moved")
  assert metrics_of(evaluate_workdir(config, workdir)) == metrics_of(finished[2])


@pytest.mark.slow
@pytest.mark.parametrize(
  "change",
  [
    {"encoder.pooling": "last", "fusion.method": "late", "encoder.random_init": True},
    {
      "prompt.template": "E V eos",
      "encoder.lora_rank": 0,
      "encoder.param_dtype": "float32",
      "encoder.bidirectional": True,
      "encoder.remat": True,
    },
  ],
  ids=["last token, late fusion, random base", "all parameters trained, bidirectional"],
)
def test_variants_train_with_images_and_evaluation_again_gives_the_same_numbers(config, tmp_path, change):
  use_images(config).update_from_flattened_dict(change)
  config.train.epochs = 1
  config.eval.test_images = (0,)
  configuration.check(config)
  trained = metrics_of(train_and_evaluate(config, tmp_path))
  assert np.isfinite(list(trained.values())).all()
  assert metrics_of(evaluate_workdir(configuration.read(tmp_path / "config.json"), tmp_path)) == trained


def use_int8_base(config):
  config.encoder.base_dtype = "int8"
  config.train.epochs = 3
  configuration.check(config)
  return config


def test_a_run_with_an_int8_base_learns_and_is_evaluated_with_it(config, tmp_path):
  trained = metrics_of(train_and_evaluate(use_int8_base(config), tmp_path))
  assert metrics_of(evaluate_workdir(configuration.read(tmp_path / "config.json"), tmp_path)) == trained
  lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  losses = [line["values"]["mean_loss"] for line in lines if line["split"] == "epoch"]
  assert losses[-1] < losses[0]
  config.encoder.base_dtype = ""
  with pytest.raises(InputError, match="this run was started with encoder.base_dtype='int8', not ''"):
    train_and_evaluate(config, tmp_path)


@pytest.mark.slow
def test_a_run_with_an_int8_base_stopped_by_sigterm_continues_to_the_same_bits(config, tmp_path, monkeypatch):
  train_and_evaluate(use_int8_base(config), tmp_path / "undisturbed")
  assert_sigterm_changes_no_bit(config, tmp_path / "undisturbed", tmp_path / "stopped", monkeypatch)


@pytest.mark.slow
def test_a_run_with_images_stopped_by_sigterm_continues_to_the_same_bits(config, tmp_path, monkeypatch):
  use_images(config).train.epochs = 2
  train_and_evaluate(config, tmp_path / "undisturbed")
  assert_sigterm_changes_no_bit(config, tmp_path / "undisturbed", tmp_path / "stopped", monkeypatch)


@pytest.mark.slow
def test_two_processes_of_four_devices_train_like_one_of_eight(config, tmp_path):
  config.mesh.update(dict(data=2, fsdp=2, tensor=2))
  config.train.epochs = 2
  train_and_evaluate(config, tmp_path / "one")
  assert_two_processes_train_like_one(config, tmp_path / "one", tmp_path / "two", devices=4, encoder="qwen2.5-0.5b")
