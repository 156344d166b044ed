"""The log of a run in its workdir: every line that it logs, with the date, also those of earlier starts."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import logging
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import jax
from ml_collections import ConfigDict

from vixml_jax.errors import Preempted
from vixml_jax.run.goodput import Goodput
from vixml_jax.run.workdir import CONFIG, LOG
from vixml_jax.stages import reporting

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def recorded(
  function: Callable[Concatenate[ConfigDict, Path, _P], _T],
) -> Callable[Concatenate[ConfigDict, Path, _P], _T]:
  """Returns the function of a config and a workdir so that its lines are also written to the workdir's log.

  The last line says how much of the time training steps took (`goodput`). Only the first process writes.
  """

  @functools.wraps(function)
  def run(config: ConfigDict, workdir: Path, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    if jax.process_index():
      return function(config, workdir, *args, **kwargs)
    with _writing_log(workdir), Goodput(workdir) as goodput, reporting(goodput):
      result = function(config, workdir, *args, **kwargs)
      goodput.save()
      _log.info("%s", goodput.line())
      return result

  return run


@contextlib.contextmanager
def _writing_log(workdir: Path) -> Iterator[None]:
  handler = _WorkdirLog(workdir)
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
  with _informed(logging.getLogger("vixml_jax")) as logger:
    logger.addHandler(handler)
    try:
      yield
    except (Exception, Preempted) as error:
      ended = _log.makeRecord(_log.name, logging.ERROR, "", 0, "ended: %s", (str(error) or type(error).__name__,), None)
      handler.handle(ended)
      raise
    finally:
      logger.removeHandler(handler)


@contextlib.contextmanager
def _informed(logger: logging.Logger) -> Iterator[logging.Logger]:
  """Lets a logger handle messages from INFO on; handlers of other loggers still get only those that they got before."""
  shown, level, propagates = logger.getEffectiveLevel(), logger.level, logger.propagate
  if shown <= logging.INFO:
    yield logger
    return
  forward = _Forward(shown)
  logger.setLevel(logging.INFO)
  logger.propagate = False
  logger.addHandler(forward)
  try:
    yield logger
  finally:
    logger.removeHandler(forward)
    logger.setLevel(level)
    logger.propagate = propagates


class _Forward(logging.Handler):
  """Gives messages from a level on to the handlers of the root logger."""

  def emit(self, record: logging.LogRecord) -> None:
    """Gives a message to the handlers of the root logger."""
    logging.getLogger().callHandlers(record)


class _WorkdirLog(logging.Handler):
  """Appends lines to the log of a workdir. Lines wait until the run has made its workdir and accepted its config."""

  def __init__(self, workdir: Path):
    super().__init__(logging.INFO)
    self._workdir = workdir
    self._waiting: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    """Appends a line. A log that cannot be written stops no run."""
    self._waiting.append(self.format(record))
    if not (self._workdir / CONFIG).exists():
      return
    with contextlib.suppress(OSError), (self._workdir / LOG).open("a", encoding="utf-8") as file:
      file.writelines(line + "\n" for line in self._waiting)
      self._waiting = []
