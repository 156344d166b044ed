"""Whole runs with images and mining give the same losses on any mesh, and nearly the same in bfloat16.

The tolerances are those of docs/reliability.md.
"""

import numpy as np
import pytest

from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_curves import train_curve
from vixml_jax import datasets
from vixml_jax.run import configuration
from vixml_jax.training.step_checks import CollapseCheck

FEATURES = 8
# Relative difference of the loss of each step.
ANY_MESH, BFLOAT16 = 2e-3, 0.02


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
  """Configs of three epochs of four steps, of texts and of images."""
  folder = tmp_path_factory.mktemp("data")
  texts = miniature_config(folder)
  builder = datasets.prepare("custom", texts.dataset.raw_dir, texts.dataset.data_dir)
  write_random_features(builder, texts.dataset.data_dir, "random", FEATURES)
  images = texts.copy_and_resolve_references()
  images.images = 3
  images.features.update(dict(name="random", dim=FEATURES))
  images.fusion.modality_dropout = 0.2
  configuration.check(images)
  return {"texts": texts, "images": images}


@pytest.fixture(scope="module")
def run(configs, tmp_path_factory):
  """Trains on so many devices, and keeps the result."""
  curves = {}

  def train(name, changes=(), devices=1, **mesh):
    key = name, changes, devices, tuple(mesh.items())
    if key not in curves:
      config = configs[name].copy_and_resolve_references()
      config.update_from_flattened_dict(dict(changes))
      curves[key] = train_curve(config, tmp_path_factory.mktemp("run"), devices, **mesh)
    return curves[key]

  return train


def assert_same_run(left, right):
  """Compares losses, bank, centroids and clusters of two runs."""
  assert len(left.losses) == len(right.losses) == 12
  print("largest relative difference of a loss:", np.max(np.abs(np.divide(left.losses, right.losses) - 1)))
  for name in ("bank", "centroids"):
    print(f"largest difference in {name}:", np.abs(getattr(left.state, name) - getattr(right.state, name)).max())
  np.testing.assert_allclose(left.losses, right.losses, rtol=ANY_MESH)
  np.testing.assert_allclose(left.state.bank, right.state.bank, atol=5e-3)
  np.testing.assert_allclose(left.state.centroids, right.state.centroids, atol=5e-3)
  np.testing.assert_array_equal(left.state.label_clusters, right.state.label_clusters)
  np.testing.assert_array_equal(left.query_clusters, right.query_clusters)


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    pytest.param("images", dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
    pytest.param("images", dict(data=8), marks=pytest.mark.slow),
    pytest.param("texts", dict(data=1, fsdp=8), marks=pytest.mark.slow),
    pytest.param("texts", dict(data=1, tensor=8), marks=pytest.mark.slow),
    pytest.param("texts", dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
  ],
)
def test_eight_devices_train_like_one_with_the_same_clusters(run, name, mesh):
  heads = ()
  if mesh.get("tensor") == 8:  # Each device needs a head; the pretrained encoder has fewer.
    heads = (("encoder.random_init", True), ("encoder.num_heads", 8), ("prototype.num_heads", 8))
  assert_same_run(run(name, heads), run(name, heads, 8, **mesh))


WITHOUT_MINING = (("mining.start_epoch", 999),)
"""Other clusters would give other batches, whose losses cannot be compared step by step."""
IN_BFLOAT16 = (("encoder.dtype", "bfloat16"),)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "texts"])
def test_losses_in_bfloat16_follow_those_in_float32(run, name):
  exact, rounded = (run(name, WITHOUT_MINING + dtype).losses for dtype in ((), IN_BFLOAT16))
  print("largest relative difference of a loss:", np.max(np.abs(np.divide(rounded, exact) - 1)))
  assert rounded != exact
  np.testing.assert_allclose(rounded, exact, rtol=BFLOAT16)


@pytest.mark.slow
def test_three_hundred_steps_in_bfloat16_end_at_the_loss_of_float32(run):
  longer = (*WITHOUT_MINING, ("train.epochs", 75))
  exact, rounded = (np.reshape(run("images", longer + dtype).losses, (5, 60)).mean(1) for dtype in ((), IN_BFLOAT16))
  print("mean loss of 60 steps, float32: ", exact.round(4))
  print("mean loss of 60 steps, bfloat16:", rounded.round(4))
  assert exact[-1] < 0.8 * exact[0]
  np.testing.assert_allclose(rounded, exact, rtol=BFLOAT16)


@pytest.mark.slow
def test_a_learning_rate_of_1000_is_reported_as_a_collapse_and_the_recipe_is_not(run, caplog):
  diverged = run("images", (("train.learning_rate", 1e3), ("train.epochs", 6)))
  (message,) = [message for message in caplog.messages if "collapsed" in message]
  assert "lower train.learning_rate" in message
  print([round(values["query_cosine"], 4) for values in diverged.steps], message)
  caplog.clear()
  check, healthy = CollapseCheck(), run("images")
  for step, values in enumerate(10 * healthy.steps, 1):
    check.add(step, values["query_cosine"])
  assert not caplog.messages and max(values["query_cosine"] for values in healthy.steps) < 0.98
