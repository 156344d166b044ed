"""Writes metrics to `metrics.jsonl`, TensorBoard and trackers; a resumed run continues without repeats in the files."""

from collections.abc import Callable
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Self

import jax

from vixml_jax.files import new_file, writing
from vixml_jax.run.workdir import METRICS, TENSORBOARD
from vixml_jax.training.tensorboard import TensorboardFile
from vixml_jax.training.trackers import Trackers

_log = logging.getLogger(__name__)


class MetricWriter:
  """Writes one JSON object a line: `step`, `epoch`, `split`, `values`. Only the first process writes."""

  def __init__(
    self,
    workdir: Path,
    first_step: int,
    open_trackers: Callable[[], Trackers] | None = None,
    *,
    epoch_end_due: bool = False,
  ):
    """Opens the files; lines of steps after `first_step`, written by a run that was killed, are dropped.

    Args:
      workdir: folder of the run.
      first_step: step of the checkpoint that the run continues from.
      open_trackers: returns trackers that receive the metrics as well; it is called in the first process.
      epoch_end_due: whether this step ended an epoch whose other lines are written again.
    """
    self._active = jax.process_index() == 0
    if not self._active:
      return
    self._path = workdir / METRICS
    kept = [
      line
      for line, step, split in _lines(self._path)
      if step < first_step or (step == first_step and (split == "train" or not epoch_end_due))
    ]
    with new_file(self._path) as work:
      work.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    with writing(self._path):
      self._file = self._path.open("a", encoding="utf-8")
    self._tensorboard = TensorboardFile(workdir / TENSORBOARD, first_step + 1)
    self._trackers = open_trackers() if open_trackers else None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    if not self._active:
      return
    with self._trackers or contextlib.nullcontext(), contextlib.closing(self._tensorboard), writing(self._path):
      self._file.close()

  def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
    """Appends one line and flushes it.

    Raises:
      InputError: The disk is full or fails.
    """
    if not self._active:
      return
    values = {name: float(value) for name, value in values.items()}
    with writing(self._path):
      self._file.write(json.dumps({"step": step, "epoch": epoch, "split": split, "values": values}) + "\n")
      self._file.flush()
    self._tensorboard.add(step, {f"{split}/{name}": value for name, value in values.items()})
    if self._trackers:
      self._trackers.log(step, split, values)

  def sync(self) -> None:
    """Waits until all lines are on the disk: a checkpoint that survives a power cut must not lack its metrics.

    Raises:
      InputError: The disk is full or fails.
    """
    if self._active:
      with writing(self._path):
        os.fsync(self._file.fileno())


def _lines(path: Path) -> list[tuple[str, int, str]]:
  """Returns the lines that were written whole, with their steps and splits; a kill may have cut the last one."""
  if not path.exists():
    return []
  found = []
  for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
    try:
      values = json.loads(line)
      found.append((line, int(values["step"]), str(values["split"])))
    except (ValueError, KeyError, TypeError):
      _log.warning("%s:%d: is damaged, so it is dropped", path, number)
  return found
