"""SIGTERM: every command ends within ten seconds, and one line says what was saved and how to continue.

Python calls a handler of signals only between two of its own instructions, and a compilation or a copy may take minutes
in between. A thread therefore hears of SIGTERM as well (`signal.set_wakeup_fd`). If the main thread has not ended the
process in time, the thread does. That loses no more than SIGKILL would: whatever is stored is whole at any instant.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from vixml_jax.errors import Preempted
from vixml_jax.stages import Callback, Stage, reporting

SECONDS = 10.0
"""Time from SIGTERM to the end of a process."""

STATUS = 128 + signal.SIGTERM
"""Exit status of a command that SIGTERM stopped; a shell reports the same for a program without a handler."""

_MARGIN = 3.0  # Seconds that a busy machine may need for the end.
_AGAIN = "start the same command again to continue"


class _Stop(Callback):
  """What the line of a stopped command says, and when the process must end. Two threads use it."""

  def __init__(self, saved: str, status: int) -> None:
    self.saved, self.status = saved, status
    self.saving: set[str] = set()
    self.told = False
    self._active: tuple[Stage, ...] = ()

  def on_stage(self, stage: Stage) -> None:
    """Notes the stages in progress."""
    others = tuple(each for each in self._active if each is not stage)
    self._active = others if stage.ended else self._active if stage in self._active else (*others, stage)

  def line(self) -> str:
    """Returns the line of a command that is stopped now."""
    active = self._active
    return f"stopped by SIGTERM{f' ({_progress(active[-1])})' if active else ''}; {self.saved}; {_AGAIN}"

  def watch(self, reading: int) -> None:
    """Waits for SIGTERM; ends when the other end of the pipe is closed."""
    with os.fdopen(reading, "rb", buffering=0) as signals:
      while numbers := signals.read(64):
        if signal.SIGTERM in numbers:
          self.end_in_time()

  def end_in_time(self) -> NoReturn:
    """Ends the process when its time is over and it is not saving anything."""
    until = time.monotonic() + SECONDS - _MARGIN
    while self.saving or time.monotonic() < until:
      time.sleep(0.05)
    with contextlib.suppress(OSError):
      if not self.told:
        os.write(2, f"{self.line()}\n".encode())  # The main thread may hold the lock of the stream.
    os._exit(self.status)


_stop = _Stop("", STATUS)


def _progress(stage: Stage) -> str:
  """Returns the name of a stage, and how much of it is done.

  >>> _progress(Stage("encode 300 labels", total=300, unit="item", done=120))
  'encode 300 labels: 120 of 300 items'
  """
  if not stage.unit:
    return stage.name
  return f"{stage.name}: {stage.done:,}{'' if stage.total is None else f' of {stage.total:,}'} {stage.plural}"


@contextlib.contextmanager
def stoppable(saved: str, status: int = STATUS) -> Iterator[None]:
  """Raises `Preempted` on SIGTERM in the block, which must end, and ends the process if it does not do so in time.

  Args:
    saved: What a command has saved when it is stopped, for its line; `has_saved` replaces it.
    status: Exit status of a process that does not end by itself.
  """
  global _stop
  _stop = stop = _Stop(saved, status)
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  former, former_hook = signal.signal(signal.SIGTERM, _preempt), sys.unraisablehook
  sys.unraisablehook = functools.partial(_raise_again, former_hook)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=stop.watch, args=(reading,), name="SIGTERM", daemon=True).start()
  with reporting(stop):
    yield
  # After an exception, the thread watches until the process has ended.
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGTERM, former)
  sys.unraisablehook = former_hook
  os.close(writing)


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
  """Raises `Preempted` itself where a library made another exception of it, as a failed import of C++ code does."""
  try:
    yield
  except Exception as error:
    cause: BaseException | None = error
    while cause is not None:
      if isinstance(cause, Preempted):
        raise cause from None
      cause = cause.__cause__ or cause.__context__
    raise


def has_saved(what: str) -> None:
  """Replaces what the line of a stopped command says was saved, such as "step 40 is saved"."""
  _stop.saved = what


def tell(line: str) -> None:
  """Prints the line of a command that is stopped."""
  print(line, file=sys.stderr, flush=True)
  _stop.told = True


def is_saving(what: str, saving: bool) -> None:
  """Says whether the process is about to save work that would be lost otherwise; meanwhile, its time is not limited.

  A training step and its checkpoint take as long as the devices and the disk need.

  Args:
    what: Names the work.
    saving: Whether it is about to be saved.
  """
  (_stop.saving.add if saving else _stop.saving.discard)(what)


def end_in_time() -> None:
  """Ends the process in time, as SIGTERM does: another process of the run has received it."""
  threading.Thread(target=_stop.end_in_time, name="SIGTERM", daemon=True).start()


def _preempt(number: int, frame: FrameType | None) -> None:
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second one would interrupt the end.
  raise Preempted(_stop.line())


def _raise_again(report: Callable[[Any], object], ignored: Any) -> None:
  """Raises `Preempted` a moment later if Python ignored it, as it does in `__del__` and callbacks of the collector."""
  if not isinstance(ignored.exc_value, Preempted):
    report(ignored)
    return
  signal.signal(signal.SIGTERM, _preempt)
  threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
