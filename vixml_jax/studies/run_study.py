"""Trains and evaluates the runs of a study, and compares them with the config as it is."""

from collections.abc import Callable, Sequence
import dataclasses
import json
import logging
from pathlib import Path
import shutil
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.files import new_file, read_json_object, write_json
from vixml_jax.run import configuration
from vixml_jax.run.workdir import CONFIG, FINAL_METRICS, PER_QUERY
from vixml_jax.studies.grids import Cell, cells_of

_log = logging.getLogger(__name__)

_RECORD = "study_run.json"
"""The config of a run whose training has ended."""


@dataclasses.dataclass(frozen=True)
class StudyRun:
  """One run of a study.

  Attributes:
    cell: What the run changes.
    seed: Its seed.
    config: Its config.
    workdir: Folder of its outputs.
  """

  cell: Cell
  seed: int
  config: ConfigDict
  workdir: Path

  @property
  def results(self) -> Path:
    """File of the metrics of each query of the evaluated split."""
    return self.workdir / f"per_query-{self.config.eval.split}.npz"

  @property
  def finished(self) -> bool:
    """Whether the run has been trained and evaluated on the split of its config.

    Raises:
      InputError: The workdir belongs to a run of another config; the message names the keys.
    """
    return self.trained and self.results.exists()

  @property
  def trained(self) -> bool:
    """Whether training has ended.

    Raises:
      InputError: The workdir belongs to a run of another config; the message names the keys.
    """
    record = self.workdir / _RECORD
    if not record.exists():
      return False
    old = read_json_object(record, absent="", damaged="delete its folder, and start the study again")
    if found := configuration.differences(old, _recipe(self.config)):
      raise InputError(f"{record}: this run had {found}; use another --output")
    return True


def plan_study(study: str, config: ConfigDict, seeds: int, split: str, folder: Path) -> list[StudyRun]:
  """Returns the runs of a study, those of a seed together; all configs are checked.

  Args:
    study: Name of the study.
    config: The config that its runs change.
    seeds: Number of seeds, which begin with that of the config.
    split: "validation" or "test", the queries to evaluate.
    folder: Folder of the study; each run has a folder in it.

  Raises:
    InputError: The study is unknown, or a config of it is invalid; the message names the run.
  """
  cells = cells_of(study, config)
  runs = []
  for seed in range(config.seed, config.seed + seeds):
    for cell in cells:
      wanted = cell.config(config, seed)
      wanted.eval.split = split
      # The tables of the study have their own intervals and differences.
      wanted.eval.update(dict(bootstrap_samples=0, baselines=()))
      try:
        configuration.check(wanted)
      except InputError as error:
        raise InputError(f"study {study}, run {cell.name!r}: {error}") from error
      runs.append(StudyRun(cell, seed, wanted, folder / f"{folder_name(cell)}-seed{seed}"))
  return runs


def folder_name(cell: Cell) -> str:
  """Returns the name of a cell with only letters, digits, dots, equal signs, underscores and dashes.

  >>> folder_name(Cell("early, residual 0.4"))
  'early_residual_0.4'
  """
  words = "".join(letter if letter.isalnum() or letter in ".=_-" else " " for letter in cell.name)
  return "_".join(words.split())


def run_study(
  runs: Sequence[StudyRun], shard: tuple[int, int] = (0, 1), show: Callable[[str], object] = lambda table: None
) -> None:
  """Trains and evaluates the runs of a shard that are not finished. An interrupted run is continued.

  Args:
    runs: All runs of the study.
    shard: Number of this shard and number of all shards: run i belongs to shard i modulo the number.
    show: Receives the table of each run.

  Raises:
    InputError: A workdir belongs to a run of another config; nothing was trained.
  """
  own = [run for number, run in enumerate(runs) if number % shard[1] == shard[0]]
  finished = [run.finished for run in own]
  for number, (run, done) in enumerate(zip(own, finished, strict=True), 1):
    title = f"run {number} of {len(own)}: {run.cell.name}, seed {run.seed}"
    if done:
      _log.info("%s: finished before", title)
      continue
    _log.info("%s: %s", title, json.dumps(dict(run.cell.changes)))
    if run.trained:
      evaluate_workdir(_with_chosen(run), run.workdir, show)
    else:
      train_and_evaluate(run.config, run.workdir, show)
      write_json(run.workdir / _RECORD, _recipe(run.config))
    with new_file(run.results) as partial:
      shutil.copyfile(run.workdir / PER_QUERY, partial)


def _recipe(config: ConfigDict) -> dict[str, Any]:
  """Returns the values of a config as JSON has them, without those of the evaluation."""
  values = json.loads(json.dumps(configuration.flatten_config(config)))
  return {key: value for key, value in values.items() if not key.startswith("eval.")}


def _with_chosen(run: StudyRun) -> ConfigDict:
  """Returns the config of a trained run, with the values that it chose, and the evaluation of the study."""
  config = configuration.read(run.workdir / CONFIG)
  config.eval = run.config.eval
  # Chosen again, so that what needs held-out queries is left out again where there are too few.
  config.dataset.validation_fraction = run.config.dataset.validation_fraction
  configuration.check(config)
  return config


def seconds_of(run: StudyRun) -> float:
  """Returns the seconds that a finished run has trained."""
  again = "delete the folder, and start the study again"
  return float(read_json_object(run.workdir / FINAL_METRICS, absent=again, damaged=again)["train_seconds"])
