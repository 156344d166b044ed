"""SIGTERM to a command: its line, its status, and its end in time whatever the main thread does."""

import signal
import subprocess
import sys
import time

import pytest

from vixml_jax import stopping

_COMMAND = """
import hashlib, time
from vixml_jax import cli, stopping
from vixml_jax.stages import stage
stopping.SECONDS = 5
def main():
  with stage("count 9 sheep", total=9, unit="row", done=2):
    print("ready", flush=True)
    {work}
cli.run(main, saved="the sheep are saved"{more})
"""
_LINE = "stopped by SIGTERM (count 9 sheep: 2 of 9 rows); the sheep are saved; start the same command again to continue"
# What does not come back to Python: the hash takes hours, and Python's handlers wait for it.
_NATIVE = "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)"


def _stopped(work, more=""):
  """Returns status, stderr and seconds of a command that gets SIGTERM while it does this."""
  code = _COMMAND.format(work=work, more=more)
  command = [sys.executable, "-c", code]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "ready\n"
  time.sleep(0.5)  # The work begins.
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=60)
  return process.returncode, errors.splitlines()[1:], time.monotonic() - began  # The first line is that of the stage.


def test_a_command_ends_with_a_line_and_status_143():
  status, lines, _ = _stopped("time.sleep(60)")
  assert (status, lines) == (143, [_LINE])


def test_sigterm_as_soon_as_its_handler_is_there_is_the_same_line():
  """The handler raises before the command's work, and before its line may name what is done."""
  code = """
import os, signal, threading
from vixml_jax import cli, stopping
start = threading.Thread.start
def started(thread):
  if thread.name == "SIGTERM":
    os.kill(os.getpid(), signal.SIGTERM)
  start(thread)
threading.Thread.start = started
cli.run(lambda: None, saved="the sheep are saved")
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  line = "stopped by SIGTERM; the sheep are saved; start the same command again to continue\n"
  assert (done.returncode, done.stderr) == (143, line)


@pytest.mark.parametrize(
  "work",
  [_NATIVE, "while True:\n      try:\n        time.sleep(60)\n      except BaseException:\n        pass"],
  ids=["native code", "an exception that is lost"],
)
def test_a_main_thread_that_does_not_come_back_is_ended_in_time(work):
  status, lines, seconds = _stopped(work)
  assert (status, lines) == (143, [_LINE])
  assert seconds < stopping.SECONDS


def test_sigterm_where_python_ignores_exceptions_ends_the_command_a_moment_later():
  work = """class Sleeper:
      def __del__(self):
        time.sleep(2)
    Sleeper()
    time.sleep(60)"""
  status, lines, seconds = _stopped(work)
  assert (status, lines) == (143, [_LINE])
  assert seconds < stopping.SECONDS - 1.5


def test_an_exception_that_a_library_made_of_sigterm_ends_the_command_with_the_same_line():
  work = """try:
      time.sleep(60)
    except BaseException as error:
      raise ImportError("initialization failed") from error"""
  status, lines, _ = _stopped(work)
  assert (status, lines) == (143, [_LINE])


def test_work_that_is_being_saved_may_take_longer():
  work = """try:
      stopping.is_saving("steps", True)
      time.sleep(60)
    except BaseException:
      time.sleep(4)
      stopping.has_saved("step 7 is saved")
      stopping.is_saving("steps", False)
      time.sleep(60)"""
  status, lines, seconds = _stopped(work)
  assert (status, lines) == (143, [_LINE.replace("the sheep are saved", "step 7 is saved")])
  assert 4 < seconds < 20


def test_a_server_ends_with_status_0():
  assert _stopped("time.sleep(60)", ", stopped=0")[0] == _stopped(_NATIVE, ", stopped=0")[0] == 0


def test_the_former_handler_is_restored_when_the_block_ends():
  before = signal.getsignal(signal.SIGTERM)
  with stopping.stoppable("nothing is saved"):
    assert signal.getsignal(signal.SIGTERM) != before
  assert signal.getsignal(signal.SIGTERM) == before
  assert signal.set_wakeup_fd(-1) == -1
