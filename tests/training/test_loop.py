"""The training loop: interrupted runs, losses that are not finite, batches on the host, several processes."""

import json
import os
import re
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData
import numpy as np
import pytest

from tests.helpers.damage import flip_a_bit
from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import (
  assert_same_bits,
  assert_sigterm_changes_no_bit,
  assert_two_processes_train_like_one,
  command,
  final_state,
  read_step,
  two_processes,
)
from vixml_jax.errors import InputError, Preempted
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.run.checkpoint import Checkpointer
from vixml_jax.training import loop, trackers
from vixml_jax.training.step import device_batch


class SentMetrics:
  """A tracking server that is a file."""

  def __init__(self, path):
    self.path = path

  def log(self, step, values):
    with self.path.open("a") as file:
      file.write(json.dumps({"step": step, "values": values}) + "\n")

  def close(self):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Config and workdir of a finished run of two epochs of four steps."""
  folder = tmp_path_factory.mktemp("loop")
  config = miniature_config(folder)
  config.train.epochs = 2
  watched = config.copy_and_resolve_references()
  watched.profile.steps = "3:4"
  watched.track.mlflow_uri = "http://127.0.0.1:1"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trackers, "_MlflowTracker", lambda config, workdir: SentMetrics(folder / "sent.jsonl"))
    train_and_evaluate(watched, folder / "run")
  return config, folder / "run"


@pytest.fixture
def config(finished):
  """A copy to change."""
  return finished[0].copy_and_resolve_references()


def test_a_run_sends_its_metrics_and_those_of_its_end_and_traces_the_steps_that_its_config_names(finished):
  _, workdir = finished
  written = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  sent = [json.loads(line) for line in (workdir.parent / "sent.jsonl").read_text().splitlines()]
  final = json.loads((workdir / "final_metrics.json").read_text())
  assert sent == [
    {"step": line["step"], "values": {f"{line['split']}/{name}": value for name, value in line["values"].items()}}
    for line in written
  ] + [{"step": 8, "values": {f"final/{name}": value for name, value in final.items()}}]
  assert {"train", "epoch", "goodput"} == {line["split"] for line in written}
  (trace,) = (workdir / "profile").rglob("*.xplane.pb")
  assert ProfileData.from_file(str(trace)).find_plane_with_name("/host:CPU") is not None


def test_a_run_stopped_by_sigterm_continues_to_the_same_bits(finished, config, tmp_path, monkeypatch):
  assert_sigterm_changes_no_bit(config, finished[1], tmp_path, monkeypatch)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 9)), "each step has one line"


def test_a_run_stopped_after_its_last_step_trains_no_step_again(finished, config, tmp_path, monkeypatch):
  calls = []

  def centroids_then_sigterm(*args):
    calls.append(args)
    if len(calls) == config.train.epochs:  # Those of the end.
      os.kill(os.getpid(), signal.SIGTERM)
    return label_centroids(*args)

  monkeypatch.setattr(loop, "label_centroids", centroids_then_sigterm)
  with pytest.raises(Preempted, match="saved step 8; start the same command again to continue"):
    train_and_evaluate(config, tmp_path)
  monkeypatch.undo()
  monkeypatch.setattr(loop, "device_batch", lambda *_: pytest.fail("a step was trained again"))
  train_and_evaluate(config, tmp_path)
  assert_same_bits(final_state(config, finished[1]), final_state(config, tmp_path))
  written = [(tmp_path / "metrics.jsonl"), (finished[1] / "metrics.jsonl")]
  stopped, undisturbed = (list(map(json.loads, path.read_text().splitlines())) for path in written)
  assert [(line["step"], line["split"]) for line in stopped] == [(line["step"], line["split"]) for line in undisturbed]
  losses = [
    [line["values"]["mean_loss"] for line in lines if line["split"] == "epoch"] for lines in (stopped, undisturbed)
  ]
  assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_with_matryoshka_dims_continues_to_the_same_bits_and_logs_the_loss_of_each_prefix(
  config, tmp_path, monkeypatch
):
  config.train.matryoshka_dims = (32, 16, 8)
  train_and_evaluate(config, tmp_path / "undisturbed")
  assert_sigterm_changes_no_bit(config, tmp_path / "undisturbed", tmp_path / "stopped", monkeypatch)
  values = json.loads((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()[0])["values"]
  np.testing.assert_allclose(values["loss"], np.mean([values[f"loss_of_{dim}"] for dim in (32, 16, 8)]), rtol=1e-5)


@pytest.mark.parametrize("bad_step,name", [(2, "loss"), (4, "gradient_norm")], ids=["within an epoch", "at its end"])
def test_a_run_stops_at_a_metric_that_is_not_finite_and_keeps_the_checkpoint_before(
  config, tmp_path, monkeypatch, bad_step, name
):
  config.checkpoint.every_steps = 1
  good = {"loss": jnp.ones(()), "gradient_norm": jnp.ones(()), "query_cosine": jnp.zeros(())}
  bad = good | {name: jnp.full((), jnp.nan)}
  steps = iter(range(1, 100))
  step = lambda state, frozen, batch: (state, bad if next(steps) == bad_step else good)
  monkeypatch.setattr(loop, "make_train_step", lambda *_: step)
  for mined in ("query_clusters", "label_centroids"):
    monkeypatch.setattr(loop, mined, lambda *_, **__: pytest.fail("the run continued with mining"))
  with pytest.raises(InputError, match=rf"step {bad_step}: .* checkpoint is of step {bad_step - 1} and is kept;"):
    train_and_evaluate(config, tmp_path)
  with Checkpointer(tmp_path / "checkpoints", 2) as checkpointer:
    assert checkpointer.latest_step() == bad_step - 1


def test_a_batch_on_the_host_is_refused(config, tmp_path, monkeypatch):
  step = jax.jit(
    lambda state, frozen, batch: (state, {"loss": batch.valid.sum()})
  )  # Compiles faster than the real one.
  monkeypatch.setattr(loop, "make_train_step", lambda *_: step)
  monkeypatch.setattr(loop, "device_batch", lambda *arguments: jax.device_get(device_batch(*arguments)))
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    train_and_evaluate(config, tmp_path)


@pytest.mark.slow
def test_after_a_flipped_bit_in_the_newest_checkpoint_the_run_ends_with_the_same_bits(finished, config, tmp_path):
  config.checkpoint.every_steps = 3
  train_and_evaluate(config, tmp_path)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]
  newest = tmp_path / "checkpoints" / "8" / "training"
  flip_a_bit(max(newest.rglob("d/*"), key=lambda path: path.stat().st_size))
  train_and_evaluate(config, tmp_path)
  assert_same_bits(final_state(config, finished[1]), final_state(config, tmp_path))


def test_two_processes_train_like_one(finished, config, tmp_path):
  config.eval.update(dict(retrieval_augmented=False, bootstrap_samples=0))  # Only what was trained is compared.
  assert_two_processes_train_like_one(config, finished[1], tmp_path)


@pytest.mark.slow
def test_killed_at_three_random_steps_a_run_ends_with_the_same_bits(config, tmp_path):
  config.train.epochs = 20
  config.checkpoint.every_steps = 7
  assert subprocess.run(**command(config, tmp_path / "undisturbed")).returncode == 0
  rng = np.random.default_rng(0)
  kill_at = sorted(rng.choice(np.arange(5, 75), 3, replace=False).tolist())
  for step in kill_at:
    process = subprocess.Popen(**command(config, tmp_path / "killed"))
    while read_step(tmp_path / "killed") < step and process.poll() is None:
      time.sleep(0.01)
    assert process.poll() is None, f"ended before step {step}: {process.communicate()[0]}"
    process.kill()
    process.communicate()
  done = subprocess.run(**command(config, tmp_path / "killed"))
  assert done.returncode == 0, done.stdout
  assert_same_bits(final_state(config, tmp_path / "undisturbed"), final_state(config, tmp_path / "killed"))


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_and_stops_both_and_the_run_continues(config, tmp_path):
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
