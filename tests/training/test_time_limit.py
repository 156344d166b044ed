"""The time limit of training: how many steps fit, and runs that it shortens."""

import json

import numpy as np
import pytest

from tests.helpers.miniature_runs import load_config, miniature_config
from tests.helpers.training_checks import assert_close, final_state, read_step, two_processes
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.run import configuration
from vixml_jax.training import loop, time_limit
from vixml_jax.training.time_limit import TimeLimit


class Clock:
  """A clock that only moves when it is told to."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: self.now)


def steps_after(monkeypatch, minutes, steps_per_epoch, seconds, first=0.0, before=0.0, epochs=20):
  """Number of steps of a run whose first step takes `first` seconds and whose others take `seconds` each."""
  clock, config = Clock(monkeypatch), load_config("custom")
  config.train.update(dict(minutes=float(minutes), epochs=epochs))
  meta = {"train_seconds": before}
  limit = TimeLimit(config, steps_per_epoch, meta)
  assert limit.total_steps == epochs * steps_per_epoch
  for step in range(1, 30):
    clock.now += first if step == 1 else seconds
    limit.after(step, np.zeros(()))
  continued = TimeLimit(config, steps_per_epoch, dict(meta))
  assert continued.total_steps == limit.total_steps
  assert (limit.epochs - 1) * steps_per_epoch < limit.total_steps <= limit.epochs * steps_per_epoch
  return limit.total_steps


@pytest.mark.parametrize(
  "case,wanted",
  [
    (dict(minutes=10, steps_per_epoch=100, seconds=1.0), 22 + 551),  # 579 s are left, and a step takes 1.05.
    (dict(minutes=10, steps_per_epoch=100, seconds=1.0, first=200.0), 22 + 360),  # Compilation is part of training,
    (dict(minutes=10, steps_per_epoch=100, seconds=1.0, before=300.0), 22 + 265),  # and so is what was trained before.
    (dict(minutes=10, steps_per_epoch=100, seconds=0.01), 2000),  # Never more than `train.epochs`.
    (dict(minutes=1, steps_per_epoch=100, seconds=10.0), 22),
    (dict(minutes=1, steps_per_epoch=10, seconds=10.0), 22),
    (dict(minutes=0, steps_per_epoch=100, seconds=10.0), 2000),
  ],
)
def test_the_steps_that_fit_are_chosen(case, wanted, monkeypatch, caplog):
  with caplog.at_level("INFO"):
    assert steps_after(monkeypatch, **case) == wanted
  assert ("steps of this run" in caplog.text) == (case["minutes"] > 0)
  assert ("training ends with them" in caplog.text) == (case["minutes"] == 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A miniature of two epochs of four steps, with a limit that none of them meets."""
  config = miniature_config(tmp_path_factory.mktemp("limit"))
  config.train.update(dict(epochs=2, minutes=1e-6))
  config.eval.update(dict(retrieval_augmented=False, bootstrap_samples=0))
  return config


@pytest.fixture
def two_steps(monkeypatch):
  """The choice is made after two steps."""
  monkeypatch.setattr(time_limit, "_UNTIMED", 1)
  monkeypatch.setattr(time_limit, "_TIMED", 1)


def test_a_run_ends_early_and_is_evaluated_and_continued_as_finished(config, two_steps, tmp_path, monkeypatch):
  train_and_evaluate(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert max(line["step"] for line in lines) == 2  # Half of the first epoch.
  stored = configuration.read(tmp_path / "config.json")
  assert stored.train.epochs == 2
  final = json.loads((tmp_path / "final_metrics.json").read_text())
  monkeypatch.setattr(loop, "device_batch", lambda *_: pytest.fail("a step was trained again"))
  assert train_and_evaluate(config, tmp_path)["P@1"] == final["P@1"]
  assert evaluate_workdir(stored, tmp_path)["P@1"] == final["P@1"]


def test_a_run_within_its_limit_is_that_of_a_run_without(config, two_steps, tmp_path):
  states = []
  for name, minutes in (("limited", 1000.0), ("free", 0.0)):
    own = config.copy_and_resolve_references()
    own.train.minutes = minutes
    train_and_evaluate(own, tmp_path / name)
    states.append(final_state(own, tmp_path / name))
  assert_close(*states)


@pytest.mark.slow
def test_two_processes_choose_the_same_number_of_steps(config, tmp_path):
  longer = config.copy_and_resolve_references()
  longer.train.epochs = 8
  processes = two_processes(longer, tmp_path)
  outputs = [process.communicate(timeout=600)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
  assert read_step(tmp_path) == 22  # The choice is made after 22 steps.
