"""Writes metrics to `metrics.jsonl` and TensorBoard; a resumed run continues both without repeats."""

import json
from pathlib import Path
from typing import Self

import jax
from tensorboardX import SummaryWriter

from vixml_jax.run.workdir import METRICS, TENSORBOARD


class MetricWriter:
  """Writes one JSON object a line: `step`, `epoch`, `split`, `values`. Only the first process writes."""

  def __init__(self, workdir: Path, first_step: int):
    """Opens the files; lines of steps after `first_step`, written by a run that was killed, are dropped."""
    self._active = jax.process_index() == 0
    if not self._active:
      return
    path = workdir / METRICS
    kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= first_step]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    self._file = path.open("a", encoding="utf-8")
    self._tensorboard = SummaryWriter(str(workdir / TENSORBOARD), purge_step=first_step + 1)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._active:
      self._file.close()
      self._tensorboard.close()

  def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
    """Appends one line and flushes it."""
    if not self._active:
      return
    values = {name: float(value) for name, value in values.items()}
    self._file.write(json.dumps({"step": step, "epoch": epoch, "split": split, "values": values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._tensorboard.add_scalar(f"{split}/{name}", value, step)


def _complete_lines(path: Path) -> list[str]:
  """Returns the lines that were written whole; a kill may have cut the last one."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").split("\n")
  return [line for line in lines[:-1] if line]
