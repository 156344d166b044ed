"""A miniature that is trained once through `vixml_jax.train`."""

import contextlib
import io
from pathlib import Path
import signal
from typing import NamedTuple

from ml_collections import ConfigDict
import pytest

from tests.helpers.miniature_runs import miniature_config
import vixml_jax


class Recorder(vixml_jax.Callback):
  """Keeps what it receives."""

  def __init__(self):
    self.stages, self.steps, self.evaluations = [], [], []

  def on_stage(self, stage):
    self.stages.append((stage.name, stage.done, stage.total, stage.ended))

  def on_step(self, step, metrics):
    self.steps.append((step, dict(metrics)))

  def on_evaluation(self, step, metrics):
    self.evaluations.append((step, dict(metrics)))


class TrainedOnce(NamedTuple):
  """The miniature, and what happened while it was trained."""

  folder: Path
  config: ConfigDict
  dataset: vixml_jax.Dataset
  model: vixml_jax.Model
  recorder: Recorder
  printed: str
  handlers: tuple[dict, dict]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  """A trained model; tests that change its workdir copy it first."""
  folder = tmp_path_factory.mktemp("api")
  config = miniature_config(folder)
  config.dataset.validation_fraction, config.train.epochs = 0.2, 1
  config.eval.update(dict(retrieval_choose=True, blend=True, every_epochs=2, baselines=()))
  dataset = vixml_jax.Dataset.from_folder(folder / "raw", data_dir=folder / "data")
  recorder, printed, before = Recorder(), io.StringIO(), signal_handlers()
  with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    model = vixml_jax.train(dataset, config, workdir=folder / "run", callbacks=[recorder], train__epochs=3)
  return TrainedOnce(folder, config, dataset, model, recorder, printed.getvalue(), (before, signal_handlers()))


def signal_handlers() -> dict:
  """Handler of each signal."""
  return {number: signal.getsignal(number) for number in signal.valid_signals()}
