"""`vixml_jax.train`: quiet, interruptible, from any thread, with callbacks that may end it."""

import json
import os
import re
import shutil
import signal
import threading
import time

import pytest

from tests.api.conftest import Recorder, signal_handlers
from tests.helpers.miniature import write_raw_folder
import vixml_jax
from vixml_jax.progress_lines import progress_lines
from vixml_jax.run import configuration, named_configs


def quick(trained):
  """The config of the trained model, with an evaluation that takes little time."""
  config = trained.config.copy_and_resolve_references()
  config.eval.update(
    dict(retrieval_augmented=False, retrieval_choose=False, blend=False, every_epochs=0, bootstrap_samples=0)
  )
  return config


def train(trained, workdir, *callbacks):
  return vixml_jax.train(trained.dataset, quick(trained), workdir=workdir, callbacks=callbacks, train__epochs=3)


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class At(vixml_jax.Callback):
  """Does something after a step."""

  def __init__(self, step, action):
    self.step, self.action = step, action

  def on_step(self, step, metrics):
    if step == self.step:
      self.action()


def stop():
  raise vixml_jax.StopTraining("enough")


def test_nothing_is_printed_and_no_signal_handler_changes(trained):
  assert trained.printed == ""
  before, after = trained.handlers
  assert before == after


def test_callbacks_receive_every_step_the_evaluations_and_the_stages(trained):
  recorder = trained.recorder
  written = [(line["step"], line["values"]) for line in lines(trained.model.workdir) if line["split"] == "train"]
  assert recorder.steps == written and [step for step, _ in written] == list(range(1, 13))
  assert [step for step, _ in recorder.evaluations] == [8, 12]
  assert recorder.evaluations[1][1] == trained.model.metrics
  assert ("train", 0, 12, False) in recorder.stages and ("train", 12, 12, True) in recorder.stages
  assert ("evaluate 16 queries", 16, 16, True) in recorder.stages


def test_the_log_of_the_workdir_has_lines_of_progress(trained, tmp_path, monkeypatch):
  slow = At(2, lambda: time.sleep(0.5))
  monkeypatch.setattr("vixml_jax.api.training.progress_lines", lambda: progress_lines(0.1))
  train(trained, tmp_path / "run", slow)
  assert re.search(r"train: \d+ of \d+ steps", (tmp_path / "run" / "log.txt").read_text())


def test_overrides_and_the_data_set_are_in_the_config_of_the_run_and_the_given_config_is_not_changed(trained):
  config = configuration.read(trained.model.workdir / "config.json")
  assert config.train.epochs == 3 and trained.config.train.epochs == 1
  assert config.dataset.raw_dir == str(trained.dataset.raw_dir)
  assert config.dataset.data_dir == str(trained.dataset.data_dir)


@pytest.mark.parametrize(
  "config,overrides,message",
  [
    ("quickstrat", {}, "there is no config 'quickstrat'; did you mean quickstart"),
    ("custom", {"train__epoch": 1}, "config.train.epoch: there is no such key; did you mean epochs"),
    ("custom", {"train__epochs": "many"}, "config.train.epochs='many': must be int, not str"),
    ("custom", {"train__epochs": -1}, "config.train.epochs=-1: must be a whole number from 0 to"),
    ("custom", {"dataset__raw_dir": "x"}, "config.dataset.raw_dir='x': is set by the data set"),
    (None, {"train__epoch": 1}, "config.train.epoch: there is no such key"),
  ],
)
def test_a_wrong_config_or_override_is_an_error_before_anything_is_written(
  trained, tmp_path, config, overrides, message
):
  config = config or named_configs.load("custom")
  with pytest.raises(vixml_jax.InputError, match=message):
    vixml_jax.train(trained.dataset, config, workdir=tmp_path / "run", **overrides)
  assert not (tmp_path / "run").exists()


def test_a_config_for_another_data_set_is_used_with_the_given_one(trained, tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr("vixml_jax.api.training.train_and_evaluate", lambda config, workdir, **_: seen.append(config))
  monkeypatch.setattr("vixml_jax.api.training.load", lambda workdir: None)
  vixml_jax.train(trained.dataset, "quickstart:images=3", workdir=tmp_path, seed=5)
  assert seen[0].dataset.name == "custom" and seen[0].images == 3 and seen[0].seed == 5


def test_after_ctrl_c_the_same_call_continues_to_the_same_model(trained, tmp_path):
  handlers, recorder = signal_handlers(), Recorder()
  with pytest.raises(KeyboardInterrupt, match="saved step 6"):
    train(trained, tmp_path / "run", At(5, lambda: os.kill(os.getpid(), signal.SIGINT)))
  assert signal_handlers() == handlers
  model = train(trained, tmp_path / "run", recorder)
  assert [step for step, _ in recorder.steps] == list(range(7, 13))
  assert [line["step"] for line in lines(tmp_path / "run") if line["split"] == "train"] == list(range(1, 13))
  assert {name: trained.model.metrics[name] for name in ("P@1", "P@3", "R@10", "nDCG@5")} == {
    name: model.metrics[name] for name in ("P@1", "P@3", "R@10", "nDCG@5")
  }


def test_in_another_thread_a_callback_ends_training_early_and_the_run_is_finished(trained, tmp_path):
  found, again = [], Recorder()
  handlers = signal_handlers()
  thread = threading.Thread(target=lambda: found.append(train(trained, tmp_path / "run", At(2, stop))))
  thread.start()
  thread.join()
  assert signal_handlers() == handlers
  (model,) = found
  assert model.predict(["arrow up"], k=1) and model.report.exists() and model.metrics["R@100"] > 0
  assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
  same = train(trained, tmp_path / "run", again)
  assert not again.steps and same.metrics["P@5"] == model.metrics["P@5"]


@pytest.mark.slow
def test_stopping_at_an_evaluation_between_epochs_ends_the_run_there(trained, tmp_path):
  class StopAtOnce(Recorder):
    def on_evaluation(self, step, metrics):
      super().on_evaluation(step, metrics)
      if step == 4:
        stop()

  recorder, config = StopAtOnce(), quick(trained)
  config.eval.every_epochs = 1
  model = vixml_jax.train(trained.dataset, config, workdir=tmp_path / "run", callbacks=[recorder], train__epochs=3)
  assert [step for step, _ in recorder.steps] == [1, 2, 3, 4]
  assert [step for step, _ in recorder.evaluations] == [4, 4]
  assert recorder.evaluations[1][1] == model.metrics
  assert model.evaluate(trained.dataset)["P@3"] == pytest.approx(model.metrics["P@3"])


def test_another_data_set_is_refused_in_the_same_workdir(trained, tmp_path):
  shutil.copytree(trained.model.workdir, tmp_path / "run")
  other = vixml_jax.Dataset.from_folder(write_raw_folder(tmp_path / "raw", seed=1), data_dir=tmp_path / "data")
  with pytest.raises(vixml_jax.InputError, match="trained on other data"):
    vixml_jax.train(other, trained.config, workdir=tmp_path / "run", train__epochs=3)
