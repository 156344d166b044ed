"""What a run reports while it works: stages, training steps and evaluations, and the callbacks that receive them.

Log lines, progress bars and the callbacks of users all receive the same reports. `reporting` says which callbacks are
active in a block; `LogLines` always is, and the commands add `ProgressBars`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import contextvars
import dataclasses
import logging
import resource
import sys
import time
from typing import Any, TypeVar

from tqdm import tqdm

from vixml_jax.errors import StopTraining

LONG = 100_000
"""Number of rows from which on a stage between epochs takes long enough to be of interest."""

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REPORTS = 0.1  # An advance costs a stage of millions of rows next to nothing.

_log = logging.getLogger(__name__)
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # The unit of `ru_maxrss`.
_Item = TypeVar("_Item")


class Callback:
  """Receives reports about a run. A subclass overrides the methods that it needs; the others do nothing.

  An exception that a method raises ends the run, and a later run continues from the last checkpoint. `StopTraining` is
  the only one that ends training early and lets the run finish. With several processes, each calls its own callbacks.

  Example:
    >>> class Losses(Callback):
    ...   def __init__(self):
    ...     self.values = []
    ...   def on_step(self, step, metrics):
    ...     self.values.append(metrics["loss"])
    >>> losses = Losses()
    >>> with reporting(losses):
    ...   report_step(1, {"loss": 0.5})
    >>> losses.values
    [0.5]
  """

  def on_stage(self, stage: "Stage") -> None:
    """Called when a stage starts, when it ends, and at most ten times per second when it advances."""

  def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
    """Called after every training step, while the devices compute the next one.

    Args:
      step: Number of the step, from 1.
      metrics: Its values, such as `loss` and `gradient_norm`.

    Raises:
      StopTraining: To end training after the step that is being computed.
    """

  def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
    """Called after every evaluation: between epochs (`eval.every_epochs`), and when training has ended.

    Args:
      step: Number of training steps of the evaluated model.
      metrics: Its metrics in percent, such as `P@1`; those with retrieval augmentation begin with `RA/`, and those of
        the blend with `blend/`.

    Raises:
      StopTraining: To end training, if the evaluation was one between epochs.
    """


@dataclasses.dataclass(eq=False)
class Stage:
  """A part of a run, such as the encoding of all labels.

  Attributes:
    name: What is done, such as "encode 294,805 training queries".
    total: Number of units of the whole stage; None if it is not known, or if they are not counted.
    unit: Name of a unit, such as "item"; empty if they are not counted.
    done: Number of units that are done.
    logged: Whether the stage is long enough to be of interest to a log.
    seconds: Time since the start.
    ended: Whether the stage has ended. A stage that fails ends as well.
    failed: Whether the stage has ended by an exception.
  """

  name: str
  total: int | None = None
  unit: str = ""
  done: int = 0
  logged: bool = True
  seconds: float = 0.0
  ended: bool = False
  failed: bool = False
  _callbacks: tuple[Callback, ...] = dataclasses.field(default=(), repr=False)
  _started: float = dataclasses.field(default_factory=time.monotonic, repr=False)
  _reported: float = dataclasses.field(default_factory=time.monotonic, repr=False)

  @property
  def plural(self) -> str:
    """The unit in the plural.

    >>> Stage("evaluate 300 queries", total=300, unit="query").plural
    'queries'
    """
    unit = self.unit.strip()
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"

  def advance(self, units: int = 1) -> None:
    """Adds units that are done."""
    self.done += units
    if time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS:
      self._report()

  def _end(self, failed: bool) -> None:
    self.ended, self.failed = True, failed
    self._report()

  def _report(self) -> None:
    self._reported = time.monotonic()
    self.seconds = self._reported - self._started
    for callback in self._callbacks:
      callback.on_stage(self)


class LogLines(Callback):
  """Logs a line when a stage starts, and one with its time and the memory in use when it has ended."""

  def on_stage(self, stage: Stage) -> None:
    """Logs the start and the end; the end of a stage that fails is not logged."""
    if not stage.logged or stage.failed:
      return
    if stage.ended:
      _log.info(
        "%s: done in %.1f s; memory of the process: %.2f GiB at most so far; arrays on its devices: %.2f GiB",
        stage.name,
        stage.seconds,
        peak_memory() / 2**30,
        device_bytes() / 2**30,
      )
    elif not stage.seconds:
      _log.info("%s", stage.name)


class ProgressBars(Callback):
  """Shows a bar for each stage whose units are counted, if stderr is a terminal; the commands use it.

  If stderr is no terminal, a line about training is logged at most every ten seconds.

  Example:
    vixml_jax.train(dataset, workdir="runs/mine", callbacks=[vixml_jax.ProgressBars()])
  """

  def __init__(self) -> None:
    self._bars: dict[Stage, tqdm] = {}
    self._logged = 0.0

  def on_stage(self, stage: Stage) -> None:
    """Opens, moves and closes the bar of a stage."""
    if not stage.unit:
      return
    if stage.ended:
      if stage in self._bars:
        bar = self._bars.pop(stage)
        bar.update(stage.done - bar.n)
        bar.close()
      return
    if stage not in self._bars:
      self._bars[stage] = tqdm(
        total=stage.total,
        initial=stage.done,
        desc=stage.name,
        unit=stage.unit,
        unit_scale=stage.unit == "B",
        disable=None,
        leave=False,
      )
    bar = self._bars[stage]
    bar.total = stage.total
    bar.update(stage.done - bar.n)

  def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows the loss in the innermost bar, which is that of training, or logs it."""
    if not self._bars:
      return
    bar = list(self._bars.values())[-1]
    if not bar.disable:
      bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
    elif time.monotonic() - self._logged > _SECONDS_BETWEEN_LINES:
      self._logged = time.monotonic()
      _log.info("step %d of %d: loss %.4f", step, bar.total, metrics["loss"])


_callbacks: contextvars.ContextVar[tuple[Callback, ...]] = contextvars.ContextVar("callbacks", default=(LogLines(),))


@contextlib.contextmanager
def reporting(*callbacks: Callback) -> Iterator[None]:
  """Adds callbacks to those that receive the reports of this thread while the block runs."""
  token = _callbacks.set((*_callbacks.get(), *callbacks))
  try:
    yield
  finally:
    _callbacks.reset(token)


@contextlib.contextmanager
def stage(
  name: str, *, total: int | None = None, unit: str = "", done: int = 0, logged: bool = True
) -> Iterator[Stage]:
  """Reports when a stage starts and ends; its `advance` reports progress.

  Args:
    name: What is done, such as "encode 294,805 training queries".
    total: Number of units of the whole stage; None if they are not counted.
    unit: Name of a unit.
    done: Number of units that an earlier run has done.
    logged: Whether to log the stage; False for stages that are too short to be of interest.
  """
  callbacks = _callbacks.get()
  current = Stage(name, total, unit, done, logged, _callbacks=callbacks)
  for callback in callbacks:
    callback.on_stage(current)
  try:
    yield current
  except BaseException:
    current._end(failed=True)
    raise
  current._end(failed=False)


def counted(items: Iterable[_Item], name: str, *, total: int | None, unit: str) -> Iterator[_Item]:
  """Yields items and reports a stage, which is not logged, that advances by one with each.

  >>> list(counted("abc", "read letters", total=3, unit="letter"))
  ['a', 'b', 'c']

  Args:
    items: The items.
    name: Name of the stage.
    total: Number of items; None if it is not known.
    unit: Name of an item.
  """
  with stage(name, total=total, unit=unit, logged=False) as current:
    for item in items:
      yield item
      current.advance()


def report_step(step: int, metrics: Mapping[str, float]) -> None:
  """Reports a training step; see `Callback.on_step`.

  Raises:
    StopTraining: A callback has raised it; the others were called as well.
  """
  _call_all(lambda callback: callback.on_step(step, metrics))


def report_evaluation(step: int, metrics: Mapping[str, float]) -> None:
  """Reports an evaluation; see `Callback.on_evaluation`.

  Raises:
    StopTraining: A callback has raised it; the others were called as well.
  """
  _call_all(lambda callback: callback.on_evaluation(step, metrics))


def _call_all(call: Callable[[Callback], None]) -> None:
  """Calls all callbacks, and raises the last `StopTraining` of theirs afterwards."""
  stop = None
  for callback in _callbacks.get():
    try:
      call(callback)
    except StopTraining as asked:
      stop = asked
  if stop is not None:
    raise stop


def peak_memory() -> int:
  """Returns the largest resident memory of this process so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES


def device_bytes() -> int:
  """Returns the bytes of all arrays on the devices of this process. Arrays that share a buffer count once."""
  import jax  # Late, because commands and users import the callbacks before they need JAX.

  sizes: dict[tuple[Any, int], int] = {}
  for array in jax.live_arrays():
    with contextlib.suppress(RuntimeError):  # Another thread has deleted it meanwhile.
      for data in [shard.data for shard in array.addressable_shards]:
        sizes[data.device, data.unsafe_buffer_pointer()] = data.nbytes
  return sum(sizes.values())
