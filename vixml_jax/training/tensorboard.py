"""Writes scalars to an event file of TensorBoard."""

from pathlib import Path
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vixml_jax.files import make_folder, writing


class TensorboardFile:
  """A new event file.

  tensorboardX's `SummaryWriter` writes in a thread of its own, whose errors nobody can catch.

  Args:
    folder: folder of all event files of the run.
    first_step: scalars of earlier files from this step on are hidden: a run that was killed had written them.
  """

  def __init__(self, folder: Path, first_step: int):
    self._folder = folder
    with writing(folder):
      make_folder(folder)
      self._events = EventsWriter(str(folder / "events"))
      self._write(first_step, session_log=SessionLog(status=SessionLog.START))
      self._events.flush()

  def add(self, step: int, scalars: dict[str, float]) -> None:
    """Writes scalars of a step.

    Raises:
      InputError: The disk is full or fails.
    """
    with writing(self._folder):
      for name, value in scalars.items():
        self._write(step, summary=scalar(name, value))
      self._events.flush()

  def close(self) -> None:
    """Closes the file.

    Raises:
      InputError: The disk is full or fails.
    """
    with writing(self._folder):
      self._events.close()

  def _write(self, step: int, **content: object) -> None:
    self._events.write_event(Event(wall_time=time.time(), step=step, **content))
