"""Lines about a long compilation: which program, how long so far, and which ones are still to come."""

from collections.abc import Iterator, Sequence
import contextlib
import logging
import threading
import time

INTERVAL_SECONDS = 30.0
"""Time from one line to the next."""
_SHOWN = 4  # Names of programs to come; the others are counted.

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def compiling(name: str, to_come: Sequence[str], interval: float = INTERVAL_SECONDS) -> Iterator[None]:
  """Logs a line when the compilation of a program starts, one every 30 seconds while it runs, and one at its end.

  Args:
    name: Name of the program.
    to_come: Names of the programs that are compiled after it.
    interval: Seconds between two lines.
  """
  done = threading.Event()
  started = time.monotonic()
  after = f"then {list_of(to_come)}" if to_come else "the last program"

  def report() -> None:
    while not done.wait(interval):
      _log.info("compiling %s: %.0f s so far; %s", name, time.monotonic() - started, after)

  thread = threading.Thread(target=report, name="progress", daemon=True)
  _log.info("compiling %s; %s", name, after)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
  _log.info("compiled %s in %.0f s", name, time.monotonic() - started)


def list_of(names: Sequence[str]) -> str:
  """Returns names as a text, of which only the first few are shown.

  >>> list_of(["a", "b", "c", "d", "e", "f"])
  'a, b, c, d and 2 more'
  """
  rest = len(names) - _SHOWN
  return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
