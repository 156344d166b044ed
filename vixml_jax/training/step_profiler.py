"""Writes a trace of chosen training steps, which XProf and TensorBoard show."""

import logging
from pathlib import Path
from typing import Any, Self

import jax

from vixml_jax.run.workdir import PROFILE

_log = logging.getLogger(__name__)


class StepProfiler:
  """Traces the steps FIRST to LAST, both included. Each process writes a trace of its own.

  Args:
    workdir: Folder of the run; the trace is written to its folder `profile`.
    steps: FIRST:LAST, as a checked config has it; "" for no trace.
  """

  def __init__(self, workdir: Path, steps: str):
    self._folder = workdir / PROFILE
    self._first, self._last = map(int, steps.split(":")) if steps else (-1, -1)
    self._active = False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._active:
      self._stop()

  def before(self, step: int) -> None:
    """Starts the trace before the first of its steps; a continued run starts within them."""
    if not self._active and self._first <= step <= self._last:
      jax.profiler.start_trace(self._folder)
      self._active = True

  def after(self, step: int, values: Any) -> None:
    """Ends the trace when the devices have computed the last of its steps, whose results are `values`."""
    if self._active and step == self._last:
      jax.block_until_ready(values)
      self._stop()

  def _stop(self) -> None:
    self._active = False
    jax.profiler.stop_trace()
    _log.info("trace of steps %d to %d: %s", self._first, self._last, self._folder)
