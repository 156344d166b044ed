"""Checks the metrics of steps: values that are not finite stop the run, and a collapsed model is reported."""

from collections.abc import Mapping
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from vixml_jax.datasets.prepared import open_dataset
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.files import write_json, writing
from vixml_jax.input.batches import Batch
from vixml_jax.remote import local_data_dir
from vixml_jax.run.workdir import NOT_FINITE

_log = logging.getLogger(__name__)
_COLLAPSED_STEPS = 10
# Values of 1 - cosine: below the first, vectors are the same for a loss whose margins are 0.1 and more.
_SAME, _NEARLY_SAME = 1e-4, 0.02
_ADVICE = "with another --workdir, lower train.learning_rate, raise train.warmup_steps or set train.clip_norm=1"


def is_finite(metrics: Mapping[str, float]) -> bool:
  """Returns whether the loss and the gradient norm of a step are finite."""
  return math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])


@dataclasses.dataclass(frozen=True)
class BatchRows:
  """Which rows of the data set the batches of a run consist of.

  Attributes:
    config: the whole config.
    workdir: folder of the run.
    train_rows: row in the split "train" of each training query, int64 [N].
  """

  config: ConfigDict
  workdir: Path
  train_rows: np.ndarray

  def not_finite(self, step: int, metrics: Mapping[str, float], batch: Batch, last_saved: int | None) -> InputError:
    """Writes the rows and uids of a batch to `not_finite.json`, and returns the error that stops the run.

    Args:
      step: number of the step.
      metrics: its metrics, with `loss` and `gradient_norm`.
      batch: its batch.
      last_saved: step of the newest checkpoint; None without one.
    """
    kept = (
      "no checkpoint was saved before it"
      if last_saved is None
      else f"the last good checkpoint is of step {last_saved} and is kept"
    )
    return InputError(
      f"step {step}: the loss is {metrics['loss']} and the gradient norm {metrics['gradient_norm']}; {kept}; "
      f"{self._listed(step, metrics, batch)}; {_ADVICE}"
    )

  def _listed(self, step: int, metrics: Mapping[str, float], batch: Batch) -> str:
    """Writes the file in the first process, and returns what the message says about the batch."""
    queries = self.train_rows[batch.query_ids[batch.valid]]
    labels = batch.label_ids[batch.valid]
    path = self.workdir / NOT_FINITE
    try:
      pairs = [
        {"query_row": row, "query_uid": uid, "label_row": label_row, "label_uid": label_uid}
        for row, uid, label_row, label_uid in zip(
          queries.tolist(), self._uids("train", queries), labels.tolist(), self._uids("labels", labels), strict=True
        )
      ]
      if jax.process_index() == 0:
        values: dict[str, Any] = {name: repr(float(value)) for name, value in metrics.items()}
        with writing(path):
          write_json(path, {"step": step, "metrics": values, "batch": pairs})
    except InputError as error:
      return f"its batch of {len(queries)} queries cannot be listed ({error})"
    first = pairs[0]
    return (
      f"its {len(pairs)} queries and labels, from {first['query_uid']!r} with {first['label_uid']!r} on, are in {path}"
    )

  def _uids(self, split: str, rows: np.ndarray) -> list[str]:
    dataset = self.config.dataset
    records = Records(open_dataset(dataset.name, local_data_dir(dataset.data_dir)), split)
    return [record.text(["uid"]) for record in records.take(rows.tolist())]


class CollapseCheck:
  """Warns once when a model gives all queries of many batches in a row nearly the same embedding.

  Measured is 1 - the mean cosine between the queries of a batch. A model counts as collapsed below a tenth of the value
  at the first step, but at most below 0.02, which leaves room for the noise of dropout; below 0.0001 it counts whatever
  the first value was. The loss does not show it: that of a collapsed model with the default constants is 0.31, which
  healthy runs reach too.
  """

  def __init__(self) -> None:
    self._limit: float | None = None
    self._steps = 0

  def add(self, step: int, query_cosine: float) -> None:
    """Takes the mean cosine between the queries of a step's batch; see `losses.mean_cosine`."""
    distance = 1 - query_cosine
    if self._limit is None:
      self._limit = max(_SAME, min(_NEARLY_SAME, distance / 10))
    self._steps = self._steps + 1 if distance < self._limit else 0
    if self._steps == _COLLAPSED_STEPS:
      self._limit = -math.inf  # One warning is enough.
      _log.warning(
        "step %d: the model has collapsed: the queries of each of the last %d batches had nearly the same embedding "
        "(mean cosine %.4f), so that no label can be told from another; stop the run and, %s",
        step,
        _COLLAPSED_STEPS,
        query_cosine,
        _ADVICE,
      )
