"""Goodput: the share of a run's wall time that training steps take, and where the rest goes, over all its starts."""

import contextlib
import contextvars
import json
from pathlib import Path
import time
from typing import Self

import jax
import jax.monitoring

from vixml_jax.files import write_json
from vixml_jax.run.workdir import CONFIG, GOODPUT
from vixml_jax.stages import Callback, Stage

KINDS = ("steps", "compile", "data", "mining", "evaluation", "checkpoint", "other")
"""Kinds of time. `mining` is what the initial state and new clusters need; `other` is outside of all stages."""

_COMPILED = "/jax/core/compile/backend_compile_duration"
# First words of the names of stages -> kind of time.
_STARTS = {
  "train": "steps",
  "save a checkpoint": "checkpoint",
  "encode test": "evaluation",
  "encode validation": "evaluation",
  "encode": "mining",
  "divide": "mining",
  "compute the means": "mining",
  "centroids": "mining",
  "compute": "evaluation",
  "evaluate": "evaluation",
  "train and evaluate": "evaluation",
  "count the words": "evaluation",
  "fit": "evaluation",
  "write": "evaluation",
}


def kind_of(name: str) -> str:
  """Returns the kind of time of a stage by its name; stages that prepare and read data have no first words in common.

  >>> kind_of("train"), kind_of("encode 294,805 labels"), kind_of("tokenize train")
  ('steps', 'mining', 'data')
  """
  words = " ".join(word for word in name.split() if not word[0].isdigit())
  fitting = [start for start in _STARTS if words == start or words.startswith(start + " ")]
  return _STARTS[max(fitting, key=len)] if fitting else "data"


_current: contextvars.ContextVar["Goodput | None"] = contextvars.ContextVar("goodput", default=None)


def current_shares() -> dict[str, float]:
  """Returns `Goodput.shares` of the run in progress; nothing outside of one, and in other processes than the first."""
  goodput = _current.get()
  return goodput.shares() if goodput else {}


class Goodput(Callback):
  """Counts the seconds of each kind. Time within a stage counts for the innermost stage, without compilation.

  The counts of earlier starts of the run are read from the workdir. What a start counted is kept when it is saved: at
  each checkpoint and at the end.

  Args:
    workdir: Folder of the run.
  """

  def __init__(self, workdir: Path):
    self._path = workdir / GOODPUT
    self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    with contextlib.suppress(OSError, ValueError):
      known = json.loads(self._path.read_text())
      self._seconds.update({kind: float(known[kind]) for kind in KINDS if kind in known})
    self._stack: list[Stage] = []
    self._since = time.monotonic()

  def __enter__(self) -> Self:
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    self._token = _current.set(self)
    return self

  def __exit__(self, *exception: object) -> None:
    _current.reset(self._token)
    jax.monitoring.unregister_event_duration_listener(self._on_duration)

  def on_stage(self, stage: Stage) -> None:
    """Counts the time since the last change for the stage that was the innermost."""
    if stage.ended and stage in self._stack:
      self._count()
      self._stack.remove(stage)
      if kind_of(stage.name) == "checkpoint":
        self.save()
    elif not stage.ended and stage not in self._stack:
      self._count()
      self._stack.append(stage)

  def shares(self) -> dict[str, float]:
    """Returns the seconds of the run so far, and the share of each kind in them."""
    self._count()
    total = max(sum(self._seconds.values()), 1e-9)
    return {"seconds": total} | {kind: self._seconds[kind] / total for kind in KINDS}

  def line(self) -> str:
    """Returns the shares as a line of the log."""
    shares = self.shares()
    rest = ", ".join(f"{kind} {shares[kind]:.1%}" for kind in KINDS[1:])
    return f"goodput: {shares['steps']:.1%} of {shares['seconds']:.0f} s were training steps; {rest}"

  def save(self) -> None:
    """Writes the counts to the workdir, if the run has made it."""
    self._count()
    if self._path.with_name(CONFIG).exists():
      write_json(self._path, {kind: self._seconds[kind] for kind in KINDS})

  def _count(self) -> None:
    now = time.monotonic()
    self._seconds[kind_of(self._stack[-1].name) if self._stack else "other"] += now - self._since
    self._since = now

  def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
    """Moves the time of a compilation from the stage in which it happened."""
    if event == _COMPILED:
      self._count()
      self._seconds[kind_of(self._stack[-1].name) if self._stack else "other"] -= duration_secs
      self._seconds["compile"] += duration_secs
