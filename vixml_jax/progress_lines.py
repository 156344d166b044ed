"""Logs a plain line about the stage in progress every half minute: what is done, how fast, and the time left."""

from collections.abc import Iterator, Mapping
import contextlib
import logging
import math
import threading
import time

from vixml_jax.stages import Callback, Stage, reporting

SECONDS = 30.0
"""Time from one line to the next."""

_log = logging.getLogger(__name__)


class ProgressLines(Callback):
  """Logs the innermost stage in progress, from a thread: a stage need not advance to be reported.

  Args:
    seconds: Time from one line to the next.
  """

  def __init__(self, seconds: float = SECONDS):
    self._seconds = seconds
    self._stages: dict[Stage, tuple[float, int]] = {}  # When each started, and what had been done before.
    self._loss = math.nan
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, name="progress lines", daemon=True)

  def on_stage(self, stage: Stage) -> None:
    """Notes which stages are in progress."""
    if stage.ended:
      self._stages.pop(stage, None)
    else:
      self._stages.setdefault(stage, (time.monotonic(), stage.done))

  def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
    """Notes the loss."""
    self._loss = metrics["loss"]

  def start(self) -> None:
    """Starts to log."""
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread."""
    self._ended.set()
    self._thread.join()

  def _run(self) -> None:
    while not self._ended.wait(self._seconds):
      active = list(self._stages.items())
      if active:
        stage, (started, before) = active[-1]
        _log.info("%s", self._line(stage, time.monotonic() - started, stage.done - before))

  def _line(self, stage: Stage, seconds: float, done: int) -> str:
    """Returns the line of a stage of which `done` units took `seconds`."""
    if not stage.unit or not done:
      return f"{stage.name}: in progress for {duration(seconds)}"
    rate = done / seconds
    line = f"{stage.name}: {stage.done:,}"
    if stage.total is not None:
      line += f" of {stage.total:,}"
    line += f" {stage.plural}, {rate:,.4g} per second"
    if stage.total is not None:
      line += f", {duration((stage.total - stage.done) / rate)} left"
    return line + (f", loss {self._loss:.4f}" if stage.unit == "step" else "")


def duration(seconds: float) -> str:
  """Returns a time as hours, minutes and seconds.

  >>> duration(3725.4)
  '1:02:05'
  """
  whole = round(seconds)
  return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextlib.contextmanager
def progress_lines(seconds: float = SECONDS) -> Iterator[None]:
  """Logs lines about the stages of this block while it runs."""
  lines = ProgressLines(seconds)
  lines.start()
  try:
    with reporting(lines):
      yield
  finally:
    lines.stop()
