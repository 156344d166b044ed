"""Training end to end on a miniature: outputs, learning, resuming, devices and processes."""

import json
import math
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import (
  assert_close,
  assert_same_bits,
  assert_stopped_and_started_again_ends_with_the_same_bits,
  assert_two_processes_train_like_one,
  command,
  final_state,
  loss_and_gradients,
  read_step,
  two_processes,
)
from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.input.batches import make_batch
from vixml_jax.run import configuration
from vixml_jax.run.from_config import set_up
from vixml_jax.run.state import abstract_state, create_state, init_params
from vixml_jax.training import loop
from vixml_jax.training.step import batch_loss, device_batch


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
  """Folder with encoder, raw files and prepared data, shared by the tests of this module."""
  folder = tmp_path_factory.mktemp("workplace")
  config = miniature_config(folder)
  set_up(config, folder)
  return folder, config


def config_of(workplace):
  return workplace[1].copy_and_resolve_references()


def test_a_run_learns_and_writes_every_output(workplace, tmp_path, capsys):
  config = config_of(workplace)
  config.train.epochs = 12
  final = train_and_evaluate(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  epochs = [line for line in lines if line["split"] == "epoch"]
  assert [line["epoch"] for line in epochs] == list(range(12))
  assert epochs[-1]["values"]["mean_loss"] < 0.8 * epochs[0]["values"]["mean_loss"]
  assert {"step", "epoch", "split", "values"} == set(lines[0])
  written = json.loads((tmp_path / "final_metrics.json").read_text())
  assert written == final
  for key in (
    "P@1",
    "P@3",
    "P@5",
    "PSP@1",
    "PSP@5",
    "nDCG@1",
    "nDCG@5",
    "R@10",
    "R@100",
    "RA/P@1",
    "RA/R@100",
    "train_seconds",
    "tokens_per_second",
  ):
    assert math.isfinite(written[key]), key
  # A query's words name its first label: a trained model finds it far more often than chance (1 in 24).
  assert written["P@1"] > 40
  for name in ("config.json", "evaluation.json", "embeddings/labels.npy", "checkpoints", "tensorboard"):
    assert (tmp_path / name).exists(), name
  assert np.load(tmp_path / "embeddings" / "labels.npy").shape == (24, 32)
  assert "P@1" in capsys.readouterr().out


def test_evaluating_a_workdir_again_gives_the_same_numbers(workplace, tmp_path):
  config = config_of(workplace)
  config.train.epochs = 1
  trained = train_and_evaluate(config, tmp_path)
  again = evaluate_workdir(configuration.read(tmp_path / "config.json"), tmp_path)
  assert {k: v for k, v in trained.items() if "@" in k} == {k: v for k, v in again.items() if "@" in k}


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(workplace, tmp_path, monkeypatch):
  config = config_of(workplace)
  assert_stopped_and_started_again_ends_with_the_same_bits(config, tmp_path, monkeypatch)
  steps = [
    json.loads(line)["step"]
    for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    if json.loads(line)["split"] == "train"
  ]
  assert steps == sorted(set(steps)), "a resumed run must not repeat lines"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(workplace, tmp_path):
  config = config_of(workplace)
  config.checkpoint.every_steps = 1
  config.train.learning_rate = config.train.new_learning_rate = 1e30
  config.train.warmup_steps = 1
  with pytest.raises(InputError, match=r"step \d+: the loss is .* lower train.learning_rate"):
    train_and_evaluate(config, tmp_path)
  run = set_up(config, tmp_path)
  with loop.Checkpointer(tmp_path / "checkpoints", 2) as checkpointer:
    kept = checkpointer.restore(checkpointer.latest_step(), run.abstract, len(run.queries))
  for leaf in jax.tree.leaves(kept.state.params):
    assert np.isfinite(jax.device_get(leaf)).all()


@pytest.mark.parametrize("mesh", [dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_eight_devices_give_the_loss_gradients_and_bank_of_one(workplace, mesh):
  run = set_up(config_of(workplace), workplace[0])
  one = loss_and_gradients(run, sharding.make_mesh(devices=jax.devices()[:1]))
  assert_close(one, loss_and_gradients(run, sharding.make_mesh(**(dict(data=1) | mesh))))


def test_remat_changes_no_number(workplace):
  run = set_up(config_of(workplace), workplace[0])
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  abstract = abstract_state(run.model, run.optimizer, len(run.queries), run.corpus.num_labels, "float32", mesh)
  state = create_state(abstract, init_params(run.model, mesh, 0), run.optimizer)
  batch = make_batch(run.queries, np.arange(len(run.queries)), 16, run.layout, seed=0, epoch=0, step=0)
  gradients = [
    jax.jit(
      jax.grad(
        lambda params, remat=remat: batch_loss(
          run.model, params, state, device_batch(batch, mesh), run.layout, run.loss, run.base_key, remat, mesh
        )[0]
      )
    )(state.params)
    for remat in (False, True)
  ]
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_checkpoint_restores_onto_one_device(workplace, tmp_path):
  config = config_of(workplace)
  config.train.epochs = 1
  train_and_evaluate(config, tmp_path)
  run = set_up(config, tmp_path)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  single = abstract_state(run.model, run.optimizer, len(run.queries), run.corpus.num_labels, "float32", mesh)
  with loop.Checkpointer(tmp_path / "checkpoints", 2) as checkpointer:
    eight = checkpointer.restore(run.total_steps, run.abstract, len(run.queries))
    one = checkpointer.restore(run.total_steps, single, len(run.queries))
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(one.state)} == {1}
  assert_same_bits(jax.device_get(eight.state), jax.device_get(one.state))


def test_another_recipe_is_refused_in_a_workdir_that_was_used(workplace, tmp_path):
  config = config_of(workplace)
  config.train.epochs = 1
  train_and_evaluate(config, tmp_path)
  config.train.batch_size = 8
  with pytest.raises(InputError, match="started with train.batch_size=16, not 8"):
    train_and_evaluate(config, tmp_path)


def test_choosing_on_held_out_queries_of_which_there_are_none_is_refused_before_training(workplace, tmp_path):
  config = config_of(workplace)
  config.dataset.validation_fraction = 1e-9
  config.eval.retrieval_choose = True
  with pytest.raises(InputError, match="config.dataset.validation_fraction=1e-09: holds out none of the 64"):
    train_and_evaluate(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_free_vectors_from_the_number_of_labels_on_give_each_label_its_own(workplace, tmp_path):
  config = config_of(workplace)
  config.train.epochs, config.train.free_vectors = 1, 32
  train_and_evaluate(config, tmp_path)
  np.testing.assert_array_equal(final_state(config, tmp_path).label_clusters[:24], np.arange(24))
  config.train.free_vectors = 64
  with pytest.raises(InputError, match="train.free_vectors=64: 32 give each of the 24 labels its own"):
    set_up(config, tmp_path)


@pytest.mark.slow
def test_killed_at_three_random_steps_a_run_ends_with_the_same_bits(workplace, tmp_path):
  config = config_of(workplace)
  config.train.epochs = 20
  config.checkpoint.every_steps = 7
  assert subprocess.run(**command(config, tmp_path / "undisturbed")).returncode == 0
  rng = np.random.default_rng()
  kill_at = sorted(rng.choice(np.arange(5, 75), 3, replace=False).tolist())
  for step in kill_at:
    process = subprocess.Popen(**command(config, tmp_path / "killed"))
    while read_step(tmp_path / "killed") < step and process.poll() is None:
      pass
    assert process.poll() is None, f"ended before step {step}: {process.communicate()[0]}"
    process.kill()
    process.communicate()
  done = subprocess.run(**command(config, tmp_path / "killed"))
  assert done.returncode == 0, done.stdout
  assert_same_bits(final_state(config, tmp_path / "undisturbed"), final_state(config, tmp_path / "killed"))


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_and_stops_both_and_the_run_goes_on(workplace, tmp_path):
  config = config_of(workplace)
  config.train.epochs = 40
  processes = two_processes(config, tmp_path)
  while read_step(tmp_path) < 3 and all(process.poll() is None for process in processes):
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  saved = [re.search(r"saved step (\d+); start the same command again", output) for output in outputs]
  assert all(saved) and saved[0][1] == saved[1][1], "\n".join(outputs)
  assert 3 <= int(saved[0][1]) < 40 * 4
  processes = two_processes(config, tmp_path)
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
  assert f"resuming at step {saved[0][1]} of 160" in outputs[0]


def test_two_processes_train_like_one(workplace, tmp_path):
  assert_two_processes_train_like_one(config_of(workplace), tmp_path)
