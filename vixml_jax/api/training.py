"""Trains a model on a data set: the function behind `python -m vixml_jax.main`, with arguments instead of flags."""

from collections.abc import Sequence
import os
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.api.dataset import Dataset
from vixml_jax.api.model import Model, load
from vixml_jax.errors import InputError, shown
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.files import path_problem
from vixml_jax.progress_lines import progress_lines
from vixml_jax.run import configuration, named_configs
from vixml_jax.run.bucket_workdir import open_workdir
from vixml_jax.stages import Callback, reporting


def train(
  dataset: Dataset,
  config: str | ConfigDict = "custom",
  *,
  workdir: str | os.PathLike[str],
  callbacks: Sequence[Callback] = (),
  **overrides: Any,
) -> Model:
  """Trains a model, evaluates it on the test queries, and writes both to a workdir.

  A run that was stopped continues when the same call is made again; one that has ended is evaluated again. After Ctrl-C
  the run ends its step and is saved before `KeyboardInterrupt` is raised; a second Ctrl-C stops it at once, and it
  continues from its last checkpoint. Outside of the main thread, Python receives no Ctrl-C; there, a callback can stop
  the run by raising an exception. Nothing is printed: messages go to the logger `vixml_jax`, and `ProgressBars` is a
  callback.

  In several processes, call `jax.distributed.initialize` first, then make the same calls in all of them, with the same
  arguments. They must see the same files. A callback that ends training must decide alike in all processes, for
  example by the metrics, which are the same everywhere. SIGTERM stops all processes at the same step; Ctrl-C does not.

  Args:
    dataset: Training queries, test queries and labels.
    config: Name of a config, such as "custom" or "quickstart:full,images=3"; path of a config file; or a config from
      `vixml_jax.run.named_configs.load`, which is not changed. The keys `dataset.name`, `dataset.raw_dir` and
      `dataset.data_dir` are those of `dataset`.
    workdir: Folder of the run, or its URL in a bucket (`gs://`, `s3://`), which needs a single process.
    callbacks: Receive progress and metrics; one that raises `StopTraining` ends training early.
    **overrides: Values of the config by their keys, with two underscores for a dot: `train__epochs=3`.

  Returns:
    The trained model.

  Raises:
    InputError: The data, the config, an override or the workdir is wrong; the message says what to do.
    KeyboardInterrupt: Ctrl-C; the run was saved.
    Preempted: The process received SIGTERM; the run was saved.

  Examples:
    >>> dataset = vixml_jax.Dataset.from_folder(raw_folder, data_dir=tmp / "data")
    >>> model = vixml_jax.train(dataset, config, workdir=workdir, train__epochs=3)
    >>> model.metrics["P@1"] > 4  # Chance is 4 percent, since there are 24 labels.
    True
  """
  config = _configured(config, dataset, overrides)
  configuration.check(config)
  if problem := path_problem(os.fspath(workdir)):
    raise InputError(f"workdir={shown(workdir)}: {problem}")
  with reporting(*callbacks), progress_lines():
    with open_workdir(os.fspath(workdir)) as opened:
      train_and_evaluate(config, opened.folder, saved=opened.saved)
    return load(workdir)


def _configured(config: str | ConfigDict, dataset: Dataset, overrides: dict[str, Any]) -> ConfigDict:
  """Returns the whole config of a run."""
  values = {key.replace("__", "."): value for key, value in overrides.items()}
  of_data = {
    "dataset.name": dataset.name,
    "dataset.raw_dir": str(dataset.raw_dir),
    "dataset.data_dir": str(dataset.data_dir),
  }
  for key in of_data.keys() & values.keys():
    raise InputError(f"config.{key}={values[key]!r}: is set by the data set; leave it out")
  values |= of_data
  if isinstance(config, ConfigDict):
    return named_configs.with_overrides(config, values)
  return named_configs.load(config, **values)
