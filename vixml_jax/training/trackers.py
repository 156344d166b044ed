"""Sends metrics to Weights & Biases and to MLflow, where a config asks for it; a server that is away stops no run."""

from collections.abc import Callable
import contextlib
import json
import logging
import os
from pathlib import Path
import queue
import threading
import time
from typing import Any, Protocol, Self

from ml_collections import ConfigDict

from vixml_jax.errors import InputError, install_command
from vixml_jax.files import write_json
from vixml_jax.run.configuration import flatten_config
from vixml_jax.run.workdir import TRACKED_RUNS

_log = logging.getLogger(__name__)

_SECONDS_TO_CLOSE = 60.0  # For values that are not sent yet when a run ends.
# The libraries report how they are used and their errors to their makers, unless their user has chosen that.
_NO_REPORTS = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
_PARAMS_AT_ONCE = 100  # The most that MLflow accepts.
_LONGEST_VALUE = 500  # Characters of a config value that MLflow accepts by default on every database.


class Tracker(Protocol):
  """A connection to a run of a tracking server."""

  def log(self, step: int, values: dict[str, float]) -> None:
    """Sends values of a step."""

  def close(self) -> None:
    """Ends the connection when all values have been sent."""


class BackgroundTracker:
  """Opens a tracker and sends values in a thread, so that training never waits for a server.

  After the first error, one line is logged and nothing more is sent.

  Args:
    name: Name of the service, for the log.
    connect: Opens the tracker; called in the thread.
  """

  def __init__(self, name: str, connect: Callable[[], Tracker]):
    self._name, self._connect = name, connect
    self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
    self._failed = threading.Event()
    self._thread = threading.Thread(target=self._send, name=name, daemon=True)
    self._thread.start()

  def log(self, step: int, values: dict[str, float]) -> None:
    """Queues values of a step."""
    if not self._failed.is_set():
      self._queue.put((step, values))

  def close(self) -> None:
    """Waits for at most a minute until everything has been sent."""
    self._queue.put(None)
    self._thread.join(_SECONDS_TO_CLOSE)
    if self._thread.is_alive():
      _log.warning("%s does not answer; its last metrics may be missing, metrics.jsonl has all", self._name)

  def _send(self) -> None:
    try:
      tracker = self._connect()
      while (item := self._queue.get()) is not None:
        tracker.log(*item)
      tracker.close()
    except Exception as error:  # Whatever a library or a server does, training continues.
      self._failed.set()
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      _log.warning("%s cannot be reached, so metrics are only written to the workdir (%s)", self._name, reason)


class Trackers:
  """The trackers that a config asks for; none by default. Only the first process should make one."""

  def __init__(self, config: ConfigDict, workdir: Path):
    self._trackers = []
    if config.track.wandb_project:
      self._trackers.append(BackgroundTracker("Weights & Biases", lambda: _WandbTracker(config, workdir)))
    if config.track.mlflow_uri:
      self._trackers.append(BackgroundTracker("MLflow", lambda: _MlflowTracker(config, workdir)))

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    for tracker in self._trackers:
      tracker.close()

  def log(self, step: int, split: str, values: dict[str, float]) -> None:
    """Sends values under the names SPLIT/NAME."""
    named = {f"{split}/{name}": value for name, value in values.items()}
    for tracker in self._trackers:
      tracker.log(step, named)


def check_trackers(config: ConfigDict) -> None:
  """Checks that the packages of the trackers are installed that a config asks for.

  Raises:
    InputError: A package is not installed.
  """
  for key, package, extra in (("wandb_project", "wandb", "wandb"), ("mlflow_uri", "mlflow", "mlflow")):
    if config.track[key]:
      _forbid_reports()
      try:
        __import__(package)
      except ImportError as error:
        advice = f"run: {install_command(extra)}"
        raise InputError(f"config.track.{key}={config.track[key]}: needs a package; {advice}") from error


def _forbid_reports() -> None:
  """Must be called before the libraries are imported."""
  for name, value in _NO_REPORTS.items():
    os.environ.setdefault(name, value)


class _WandbTracker:
  """A run of Weights & Biases, which is continued with the workdir's."""

  def __init__(self, config: ConfigDict, workdir: Path):
    _forbid_reports()
    import wandb

    known = _known_run(workdir, "wandb")
    self._run = wandb.init(
      project=config.track.wandb_project,
      name=config.name,
      id=known,
      resume="allow" if known else None,
      dir=workdir,
      config=config.to_dict(),
      settings=wandb.Settings(console="off", silent=True, init_timeout=30),
    )
    _remember_run(workdir, "wandb", self._run.id)
    # A continued run repeats steps, which `wandb.log(step=...)` would drop.
    self._run.define_metric("*", step_metric="step")

  def log(self, step: int, values: dict[str, float]) -> None:
    self._run.log({"step": step} | values)

  def close(self) -> None:
    self._run.finish()


class _MlflowTracker:
  """A run of an MLflow server, which is continued with the workdir's."""

  def __init__(self, config: ConfigDict, workdir: Path):
    _forbid_reports()
    from mlflow import MlflowClient

    self._client = MlflowClient(config.track.mlflow_uri)
    known = _known_run(workdir, "mlflow")
    self._run_id = known or self._new_run(config)
    if known:
      self._client.update_run(known, status="RUNNING")
    else:
      _remember_run(workdir, "mlflow", self._run_id)

  def _new_run(self, config: ConfigDict) -> str:
    """Returns the id of a new run, which has the values of the config."""
    from mlflow.entities import Param

    name = config.track.mlflow_experiment
    found = self._client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else self._client.create_experiment(name)
    run_id = self._client.create_run(experiment, run_name=config.name).info.run_id
    params = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in flatten_config(config).items()]
    for first in range(0, len(params), _PARAMS_AT_ONCE):
      self._client.log_batch(run_id, params=params[first : first + _PARAMS_AT_ONCE])
    return run_id

  def log(self, step: int, values: dict[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    # The names of MLflow have no "@".
    metrics = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
    self._client.log_batch(self._run_id, metrics=metrics)

  def close(self) -> None:
    self._client.set_terminated(self._run_id)


def _known_run(workdir: Path, service: str) -> str | None:
  """Returns the id of the workdir's run at a service; None if there is none, or the file is damaged."""
  with contextlib.suppress(OSError, ValueError, AttributeError):
    return json.loads((workdir / TRACKED_RUNS).read_text()).get(service)
  return None


def _remember_run(workdir: Path, service: str, run_id: str) -> None:
  known: dict[str, Any] = {}
  with contextlib.suppress(OSError, ValueError):
    known = json.loads((workdir / TRACKED_RUNS).read_text())
  write_json(workdir / TRACKED_RUNS, known | {service: run_id})
