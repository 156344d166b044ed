"""Three processes that `jax.distributed` joins: one is killed, hangs, fails or receives SIGTERM, and the others end."""

import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from vixml_jax import joined_processes, stopping

_COUNT = 3
_PROCESS = """
import pathlib, sys, time
from vixml_jax import cli, joined_processes, stopping
joined_processes.HEARTBEAT_SECONDS, joined_processes._SILENT_SECONDS, joined_processes._BEAT_SECONDS = 12, 7, 1
work, ready = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))
def main():
  import jax, numpy as np
  from jax.experimental import multihost_utils
  from vixml_jax.errors import InputError
  multihost_utils.process_allgather(np.int32(0))
  ready.touch()
  if work == "end":
    joined_processes._BEAT_SECONDS = 0  # From its next beat on, the thread is always in C++.
    time.sleep(1.5)
  while work != "end":
    if work == "exchange":
      multihost_utils.process_allgather(np.int32(0))
    time.sleep(0.1)
    if work == "fail" and jax.process_index() == 1:
      raise InputError("a file of this process is damaged")
cli.run(main, saved="nothing is saved")
"""


@pytest.fixture
def start(tmp_path):
  """Starts the processes, and kills what is left of them after the test."""
  started = []
  yield lambda work: _start(work, started, tmp_path)
  for process in started:
    process.kill()
    process.communicate()


def _start(work, processes, folder):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  processes += [
    subprocess.Popen(
      [
        sys.executable,
        "-c",
        _PROCESS,
        work,
        str(folder / f"ready-{number}"),
        f"--coordinator=localhost:{port}",
        f"--num_processes={_COUNT}",
        f"--process={number}",
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(_COUNT)
  ]
  for number, process in enumerate(processes):
    while not (folder / f"ready-{number}").exists():
      assert process.poll() is None, process.communicate()[1]
      time.sleep(0.05)
  return processes


def _ended(processes):
  """Returns the exit status and the last line of stderr of each process."""
  found = [(process, process.communicate(timeout=120)[1]) for process in processes]
  return [(process.returncode, errors.splitlines()[-1]) for process, errors in found]


def test_processes_that_have_done_their_work_end_with_status_0_and_without_a_line(start):
  processes = start("end")
  assert [(process.communicate(timeout=120)[1], process.returncode) for process in processes] == [("", 0)] * _COUNT


@pytest.mark.parametrize(
  "work,number,victim",
  [
    ("exchange", signal.SIGKILL, 1),
    pytest.param("exchange", signal.SIGKILL, 0, marks=pytest.mark.slow),
    pytest.param("exchange", signal.SIGSTOP, 2, marks=pytest.mark.slow),
    pytest.param("exchange", signal.SIGSTOP, 0, marks=pytest.mark.slow),
    pytest.param("wait", signal.SIGKILL, 1, marks=pytest.mark.slow),
    pytest.param("wait", signal.SIGKILL, 0, marks=pytest.mark.slow),
  ],
)
def test_the_others_end_and_name_the_lost_process(start, work, number, victim):
  processes = start(work)
  processes[victim].send_signal(number)
  lost = time.monotonic()
  ends = _ended([process for index, process in enumerate(processes) if index != victim])
  assert time.monotonic() - lost < 60
  for status, line in ends:
    assert status == joined_processes.STATUS, line
    assert re.fullmatch(rf"lost process {victim} of {_COUNT}, .* to continue", line)


@pytest.mark.slow
def test_a_process_that_fails_says_why_and_is_lost_to_the_others(start):
  ends = _ended(start("fail"))
  assert ends[1] == (1, "error: a file of this process is damaged")
  assert ends[0][0] == ends[2][0] == joined_processes.STATUS
  assert ends[0][1].startswith("lost process 1 of 3") and ends[2][1].startswith("lost process 1 of 3")


def test_sigterm_to_one_process_ends_all_in_time(start):
  processes = start("wait")
  processes[1].send_signal(signal.SIGTERM)
  asked = time.monotonic()
  ends = _ended(processes)
  assert time.monotonic() - asked < stopping.SECONDS + 5
  assert (
    ends == [(stopping.STATUS, "stopped by SIGTERM; nothing is saved; start the same command again to continue")] * 3
  )
