"""Metrics at Weights & Biases and MLflow, which a run sends without waiting for them or failing with them."""

import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

from ml_collections import ConfigDict
import pytest

from configs.common import base_config
from vixml_jax.errors import InputError
from vixml_jax.training import trackers
from vixml_jax.training.metric_writer import MetricWriter
from vixml_jax.training.trackers import BackgroundTracker, Trackers, check_trackers

ROOT = Path(__file__).resolve().parents[2]
VALUES = {"loss": 0.5, "P@1": 61.5}


def tracking(**keys) -> ConfigDict:
  config = base_config()
  config.name = "tracked"
  config.track.update(keys)
  return config


def steps_of(folder):
  return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Recorder:
  def __init__(self):
    self.got, self.closed = [], False

  def log(self, step, values):
    self.got.append((step, values))

  def close(self):
    self.closed = True


def test_the_metric_writer_sends_the_same_values_to_trackers(tmp_path, monkeypatch):
  recorder = Recorder()
  monkeypatch.setattr(trackers, "_MlflowTracker", lambda *_: recorder)
  config = tracking(mlflow_uri="http://127.0.0.1:1")
  with MetricWriter(tmp_path, 0, lambda: Trackers(config, tmp_path)) as writer:
    writer.write(1, 0, "train", VALUES)
    writer.write(2, 0, "test", VALUES)
  assert recorder.closed and steps_of(tmp_path) == [1, 2]
  assert recorder.got == [(1, {"train/loss": 0.5, "train/P@1": 61.5}), (2, {"test/loss": 0.5, "test/P@1": 61.5})]


@pytest.mark.parametrize("fails", ["connect", "log", "close"])
def test_a_tracker_that_fails_is_one_line_in_the_log(fails, caplog):
  class Failing(Recorder):
    def __init__(self):
      super().__init__()
      self._fail("connect")

    def _fail(self, what):
      if what == fails:
        raise ConnectionError("the server\nis away")

    def log(self, step, values):
      self._fail("log")

    def close(self):
      self._fail("close")

  tracker = BackgroundTracker("MLflow", Failing)
  for step in range(3):
    tracker.log(step, VALUES)
    time.sleep(0.01)
  tracker.close()
  assert caplog.messages == [
    "MLflow cannot be reached, so metrics are only written to the workdir (the server is away)"
  ]


def test_a_tracker_that_does_not_answer_delays_neither_the_run_nor_its_end(monkeypatch, caplog):
  monkeypatch.setattr(trackers, "_SECONDS_TO_CLOSE", 0.1)
  started = time.monotonic()
  tracker = BackgroundTracker("MLflow", lambda: time.sleep(2) or Recorder())
  tracker.log(1, VALUES)
  tracker.close()
  assert time.monotonic() - started < 1.5
  assert "MLflow does not answer" in caplog.messages[0]


def test_a_server_that_is_away_is_one_line_in_the_log(tmp_path, monkeypatch, caplog):
  pytest.importorskip("mlflow", reason="needs mlflow: pip install -c constraints.txt -e '.[mlflow]'")
  monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    config = tracking(mlflow_uri=f"http://127.0.0.1:{free.getsockname()[1]}")
    with MetricWriter(tmp_path, 0, lambda: Trackers(config, tmp_path)) as writer:
      writer.write(1, 0, "train", VALUES)
  assert steps_of(tmp_path) == [1]
  (message,) = [message for message in caplog.messages if "cannot be reached" in message]
  assert message.startswith("MLflow cannot be reached, so metrics are only written to the workdir (")


def test_metrics_reach_weights_and_biases_without_its_server_and_a_continued_run_is_the_same(tmp_path, monkeypatch):
  wandb = pytest.importorskip("wandb", reason="needs wandb: pip install -c constraints.txt -e '.[wandb]'")
  for name, value in {"MODE": "offline", "ERROR_REPORTING": "false", "SILENT": "true"}.items():
    monkeypatch.setenv(f"WANDB_{name}", value)
  config = tracking(wandb_project="icons")
  for step in (1, 2):
    with Trackers(config, tmp_path) as both:
      both.log(step, "train", VALUES)
  wandb.teardown()
  files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
  run_id = json.loads((tmp_path / "tracked_runs.json").read_text())["wandb"]
  assert files and all(file.name == f"run-{run_id}.wandb" for file in files)
  content = b"".join(file.read_bytes() for file in files)
  assert b"train/P@1" in content and b"61.5" in content


def test_a_package_that_is_not_installed_is_refused_before_the_run(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "wandb", None)
  with pytest.raises(InputError, match=r"config.track.wandb_project=p: needs a package; run: pip install .*\[wandb\]"):
    check_trackers(tracking(wandb_project="p"))
  check_trackers(tracking())


def test_the_libraries_are_asked_to_report_nothing_to_their_makers(tmp_path):
  script = """
import os
from tests.training.test_trackers import check_trackers, tracking
check_trackers(tracking(mlflow_uri="http://127.0.0.1:1"))
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled() and os.environ["WANDB_ERROR_REPORTING"] == "false"
"""
  env = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "WANDB", "PYTEST"))}
  result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
  assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_an_mlflow_server_has_the_metrics_of_a_continued_run(tmp_path, monkeypatch):
  """`MLFLOW_SERVER` names the program `mlflow` of an environment with the whole package, which has the server."""
  program = os.environ.get("MLFLOW_SERVER") or pytest.skip(
    "needs the server of MLflow: pip install mlflow in an environment of its own, and set MLFLOW_SERVER to its program"
  )
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  uri = f"http://127.0.0.1:{port}"
  flags = [f"--backend-store-uri=sqlite:///{tmp_path}/mlflow.db", f"--port={port}", "--host=127.0.0.1", "--workers=1"]
  env = {"PATH": f"{Path(program).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
  with (tmp_path / "server.log").open("w") as log:
    server = subprocess.Popen(
      [shutil.which(program), "server", *flags], cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True
    )
  try:
    _wait_for(f"{uri}/health", server, tmp_path / "server.log")
    config = tracking(mlflow_uri=uri)
    for first, steps in ((0, (1, 2)), (2, (3,))):
      with MetricWriter(tmp_path, first, lambda: Trackers(config, tmp_path)) as writer:
        for step in steps:
          writer.write(step, 0, "train", {"loss": step / 8, "P@1": 60.0})
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("vixml_jax").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert run.data.metrics["train/P_at_1"] == 60.0 and run.info.status == "FINISHED"
    assert run.data.params["train.batch_size"] == str(config.train.batch_size)
  finally:
    os.killpg(server.pid, 15)
    server.wait(20)


def _wait_for(address, server, log):
  for _ in range(240):
    assert server.poll() is None, log.read_text()
    try:
      with urllib.request.urlopen(address, timeout=1):
        return
    except OSError:
      time.sleep(0.5)
  pytest.fail(log.read_text())
