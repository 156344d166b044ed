"""Tries examples of bad input: each gives the right result, or one line that names the place, in bounded time and RAM.

`make test` tries a few examples of each mutation, `make test-slow` many. Both draw the same ones every time, unless
`--hypothesis-seed` is given.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
from pathlib import Path
import re
import signal
import time
import traceback
from typing import Any, NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase, core, strategies
import pytest

from vixml_jax.errors import InputError

SECONDS = 20
"""Most seconds that an example may take."""
PEAK_BYTES = 384 * 2**20
"""Most memory that an example may take. The longest line, 64 MiB, is read as bytes, as a text and as values."""
MESSAGE_CHARS = 700
"""Most characters of a message, besides paths."""

QUICK = 3
"""Examples of each mutation in `make test`."""

_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
_STATUS = Path("/proc/self/status")
_PATH = re.compile(r"/[\w./ -]+")


class Refused(NamedTuple):
  """Bad input that was refused with one line."""

  message: str


class Expected(NamedTuple):
  """What an example must give.

  Attributes:
    value: The result; None if the input must be refused.
    naming: What the message must have if the input is refused; None if it must not be.
  """

  value: Any = None
  naming: tuple[str, ...] | None = None


def refused(*naming: str) -> Expected:
  """Input that must be refused, with a message that has these parts."""
  return Expected(None, naming)


@dataclasses.dataclass
class Tally:
  """What the examples of a kind of input gave."""

  examples: int = 0
  refused: int = 0
  seconds: float = 0.0
  peak: int = 0

  def attempt(self, action: Callable[[], Any], errors: tuple[type[Exception], ...] = (InputError,)) -> Any:
    """Returns what an action returns, or `Refused` if it raised one of `errors` with one line.

    An action that takes too long or too much memory, and any other exception, fails the test.
    """
    self.examples += 1
    base = _reset_peak()
    start = time.perf_counter()
    found: Any
    try:
      with _time_limit():
        found = action()
    except errors as error:
      found = Refused(str(error))
      self.refused += 1
    self.seconds = max(self.seconds, time.perf_counter() - start)
    grown = _peak() - base
    self.peak = max(self.peak, grown)
    assert grown <= PEAK_BYTES, f"took {grown / 2**20:.0f} MiB"
    if isinstance(found, Refused):
      assert found.message and "\n" not in found.message, found
      assert len(_PATH.sub("", found.message)) <= MESSAGE_CHARS, found
    return found

  def judge(self, found: Any, expected: Expected) -> None:
    """Fails the test unless a result is the expected one."""
    if isinstance(found, Refused):
      assert expected.naming is not None, found
      assert all(part in found.message for part in expected.naming), (found.message, expected.naming)
    else:
      assert expected.value is not None, ("accepted", found)
      assert found == expected.value, (found, expected.value)


Check = Callable[[Tally, Any], None]


def examples_of_each(number: int) -> Any:
  """Parametrizes a test with the number of examples of each mutation, for `make test` and for `make test-slow`."""
  return pytest.mark.parametrize("each", [QUICK, pytest.param(number, marks=pytest.mark.slow)], ids=["quick", "full"])


def run(
  kind: str,
  mutations: Mapping[str, strategies.SearchStrategy[Any]],
  check: Check,
  each: int,
  record_property: Callable[[str, object], None],
) -> None:
  """Tries examples of every mutation, and records what they gave for the report of pytest."""
  tally, failures = Tally(), []
  for name, cases in mutations.items():
    try:
      _tried(tally, cases, check, each)
    except Exception as error:
      error.add_note(f"{kind}: {name}")
      failures.append(error)
  record_property("bad input", (kind, tally.examples, tally.refused, tally.seconds, tally.peak / 2**20))
  if failures:
    raise ExceptionGroup(f"{len(failures)} of {len(mutations)} mutations of {kind}", failures)


def _tried(tally: Tally, cases: strategies.SearchStrategy[Any], check: Check, each: int) -> None:
  @hypothesis.settings(
    max_examples=each,
    # Not derandomized, a run takes the seed of --hypothesis-seed.
    derandomize=core.global_force_seed is None,
    database=None,
    deadline=None,
    phases=(Phase.generate,),  # The mutations are small already.
    suppress_health_check=list(HealthCheck),
  )
  @hypothesis.given(cases)
  def tried(case: Any) -> None:
    check(tally, case)

  tried()


class _TooLong(Exception):
  pass


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
  def stop(*_: object) -> None:
    raise _TooLong("".join(traceback.format_stack(limit=8)))

  former = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


def _reset_peak() -> int:
  """Sets the peak of this process's memory to what it has now, and returns that in bytes; 0 where there is no Linux."""
  if not _STATUS.exists():
    return 0
  Path("/proc/self/clear_refs").write_text("5")
  return _peak()


def _peak() -> int:
  found = _PEAK.search(_STATUS.read_text()) if _STATUS.exists() else None
  return int(found[1]) * 1024 if found else 0
