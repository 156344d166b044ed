"""Runs with images on a miniature: evaluation with fewer images, evaluation again, fusions, an interrupted run."""

import json
import shutil

import numpy as np
import pytest

from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import assert_sigterm_changes_no_bit, metrics_of
from vixml_jax import datasets
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.run import configuration

FEATURES = 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Config of a finished run with random image features, its folder, its metrics and what it printed."""
  folder = tmp_path_factory.mktemp("images")
  config = miniature_config(folder)
  builder = datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
  write_random_features(builder, config.dataset.data_dir, "random", FEATURES)
  config.images = 3
  config.features.update(dict(name="random", dim=FEATURES))
  config.fusion.modality_dropout = 0.2
  config.train.epochs = 2
  config.eval.test_images = (0, 1, 3)
  configuration.check(config)
  tables = []
  final = train_and_evaluate(config, folder / "run", tables.append)
  return config, folder / "run", final, tables[0]


@pytest.fixture
def config(finished):
  """A copy to change."""
  return finished[0].copy_and_resolve_references()


def test_a_run_is_also_evaluated_with_fewer_images(finished):
  _, workdir, final, printed = finished
  by_images = json.loads((workdir / "evaluation.json").read_text())["by_test_images"]
  assert list(by_images) == ["0", "1", "3"]
  assert "at most 0 images per query" in printed and "at most 3 images per query + retrieval" in printed
  # No query has more than three images.
  assert metrics_of(by_images["3"]["metrics"]) == metrics_of(final)
  assert by_images["0"]["metrics"] != by_images["3"]["metrics"]


def test_evaluating_again_needs_no_tower_and_gives_the_same_numbers(finished, tmp_path):
  workdir = shutil.copytree(finished[1], tmp_path / "run")
  config = configuration.read(workdir / "config.json")
  config.eval.test_images = (0,)
  config.features.checkpoint = "elsewhere.npz"
  evaluated = evaluate_workdir(config, workdir)
  assert configuration.read(workdir / "config.json").features.checkpoint == "elsewhere.npz"
  assert metrics_of(evaluated) == metrics_of(finished[2])
  assert list(json.loads((workdir / "evaluation.json").read_text())["by_test_images"]) == ["0"]


@pytest.mark.parametrize(
  "template,fusion",
  [
    pytest.param("E V", dict(adapter="mlp", residual=0.3), marks=pytest.mark.slow),
    pytest.param("V E", dict(adapter="cross_attention", residual=0.3), marks=pytest.mark.slow),
    ("V E", dict(method="late", adapter="gated")),
  ],
)
def test_every_kind_of_fusion_trains_and_evaluates(config, tmp_path, template, fusion):
  config.prompt.template = template
  config.fusion.update(fusion)
  config.train.epochs = 1
  config.eval.test_images = ()
  configuration.check(config)
  assert np.isfinite(list(metrics_of(train_and_evaluate(config, tmp_path)).values())).all()


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_continues_to_the_same_bits(finished, config, tmp_path, monkeypatch):
  assert_sigterm_changes_no_bit(config, finished[1], tmp_path, monkeypatch)
