"""The processes of a run that `jax.distributed` joins: how they start, and how they end when one is stopped or lost.

A lost process does not answer any more: it was killed, it hangs, or its machine or network failed. JAX notices it by
its missing heartbeats and aborts the other processes with many lines of C++. Here the abort becomes one line that names
the process. SIGTERM to one process is known to all of them, since `jax.distributed` passes it on.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from vixml_jax import stopping
from vixml_jax.errors import InputError

STATUS = 75
"""Exit status after the loss of another process: EX_TEMPFAIL of sysexits.h, a failure that another try may not have."""

HEARTBEAT_SECONDS = 40
"""Time without a heartbeat after which JAX takes a process for lost."""

_BEAT_SECONDS = 2.0
_SILENT_SECONDS = 12.0  # Without a beat for so long, a process is the one that was lost.
_LEAVE_SECONDS = 10.0
_LAST_SECONDS = 5.0  # Process 0 ends after the others, which would take it for the lost one.
_ALIVE = "vixml_jax/alive/"
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # Key under which jax.distributed stores that a process has received SIGTERM.

_log = logging.getLogger(__name__)


class _Members:
  """Notes which of the joined processes give signs of life, and names the one that was lost.

  Args:
    client: Client of JAX's coordination service, which process 0 runs.
    address: HOST:PORT of the service.
    count: Number of processes.
    index: Number of this process.
  """

  def __init__(self, client: Any, address: str, count: int, index: int):
    self._client, self._address, self._count, self.index = client, address, count, index
    now = time.monotonic()
    self._values: dict[int, str] = {}
    self._heard = dict.fromkeys(range(count), now)
    self._answered = now
    self._stopped = False
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._beat, name="joined processes", daemon=True)
    self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)

  def start(self) -> None:
    """Starts to give signs of life and to note those of others, and takes over the abort of JAX."""
    self._thread.start()
    atexit.register(self.leave)
    # Python's own handlers run in the main thread, when it returns to Python: an abort does not wait for that.
    ctypes.CDLL(None).signal(signal.SIGABRT, self._abort)

  def leave(self) -> None:
    """Leaves the others, and ends the thread: C++ code that returns to an interpreter that has ended aborts."""
    import jax

    jax.distributed.shutdown()
    self._ended.set()
    self._thread.join(_LEAVE_SECONDS)

  def _beat(self) -> None:
    number = 0
    while not self._ended.is_set():
      number += 1
      with contextlib.suppress(Exception):  # The service is lost or ends; JAX decides about it.
        self._client.key_value_set(f"{_ALIVE}{self.index}", str(number), allow_overwrite=True)
        self._note(self._client.key_value_dir_get(_ALIVE))
      if not self._stopped:
        with contextlib.suppress(Exception):  # There is no notice.
          self._client.key_value_try_get(_NOTICE)
          self._stopped = True
          stopping.end_in_time()
      self._ended.wait(_BEAT_SECONDS)

  def _note(self, entries: list[tuple[str, str]]) -> None:
    self._answered = time.monotonic()
    for key, value in entries:
      index = int(key.rpartition("/")[2])
      if self._values.get(index) != value:
        self._values[index], self._heard[index] = value, self._answered

  def lost(self) -> list[int]:
    """Returns the processes that give no sign of life; process 0 if its service does not answer."""
    silent_since = time.monotonic() - _SILENT_SECONDS
    if self.index and (self._answered < silent_since or not _answers(self._address)):
      return [0]
    return [index for index, heard in self._heard.items() if heard < silent_since and index != self.index]

  def _aborted(self, number: int) -> None:
    """Ends the process with one line if its abort is due to the loss of another; otherwise the abort continues."""
    if lost := self.lost():
      self.end(lost)

  def end(self, lost: list[int]) -> NoReturn:
    """Ends the process with a line that names the lost ones."""
    names = f"process{'es' if len(lost) > 1 else ''} {', '.join(map(str, lost))} of {self._count}"
    line = f"lost {names}, which ended or does not answer; start all again with the same command to continue\n"
    os.write(2, line.encode())  # Another thread may hold the lock of the stream.
    if not self.index:
      time.sleep(_LAST_SECONDS)
    os._exit(STATUS)


_members: _Members | None = None


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
  """Joins the processes of the run.

  Args:
    coordinator: HOST:PORT of process 0; None on a cluster that JAX detects, as the other arguments.
    count: Number of processes.
    index: Number of this process.

  Raises:
    InputError: JAX detects no cluster here.
  """
  global _members
  import jax
  from jax._src import distributed  # JAX has no public access to the client; Orbax takes it from here, too.

  try:
    jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:  # It should be given what no cluster says.
    flag = f"--coordinator={coordinator}" if coordinator else "--distributed"
    raise InputError(
      f"{flag}: JAX detects no cluster here ({error}); give --coordinator, --num_processes and --process"
    ) from error
  state = distributed.global_state
  if state.num_processes > 1:
    _members = _Members(state.client, str(state.coordinator_address), state.num_processes, state.process_id)
    _members.start()


def are_joined() -> bool:
  """Returns whether this process has joined others."""
  return _members is not None


def wait_for_loss() -> None:
  """Ends this process if its error is due to the loss of another, which JAX notices later; otherwise returns.

  Exchanges between CPUs fail at once with errors of their connections, which do not name the process.
  """
  assert _members is not None
  _log.info("an error; waiting for %d s to see whether another process was lost", HEARTBEAT_SECONDS)
  until = time.monotonic() + HEARTBEAT_SECONDS
  while time.monotonic() < until:
    time.sleep(0.5)
    if lost := _members.lost():
      _members.end(lost)


def leave(status: int) -> NoReturn:
  """Ends this process, which was stopped or has an error. It waits a few seconds at most for the others to end as well.

  They wait for this one in exchanges, and only its end tells them. If all have the same error, all leave at once.
  """
  assert _members is not None
  leaving = threading.Thread(target=_members.leave, name="leave", daemon=True)
  leaving.start()
  leaving.join(_LEAVE_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _answers(address: str) -> bool:
  """Returns whether something listens at HOST:PORT."""
  host, _, port = address.rpartition(":")
  try:
    with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
      return True
  except OSError:
    return False
