"""Commands as `python -m` starts them, each in a fork of one process that has done the slow imports."""

import atexit
import functools
import json
from pathlib import Path
import subprocess
import sys
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Each line of stdin is the arguments of `run_command`, and each line of stdout the status and the seconds of a command.
_FORK_SERVER = """
import json, os, runpy, signal, sys, threading, time
import vixml_jax.experiment, ml_collections.config_flags, vixml_jax.inference.loading, vixml_jax.exporting.export

for line in sys.stdin:
  (module, *arguments), logs, delay = json.loads(line)
  start = time.monotonic()
  child = os.fork()
  if not child:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, log in enumerate(logs, 1):
      os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [module, *arguments]
    status = 99  # The module came back instead of exiting.
    try:
      runpy.run_module(f"vixml_jax.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
      status = stop.code
    except BaseException:
      import traceback
      traceback.print_exc()
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status or 0)
  if delay is not None:
    timer = threading.Timer(delay, os.kill, (child, signal.SIGTERM))
    timer.start()
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  seconds = time.monotonic() - start
  if delay is not None:
    timer.cancel()
  print(json.dumps([status, seconds]), flush=True)
"""


class Finished(NamedTuple):
  """What a command did.

  Attributes:
    status: Exit status; the negative number of the signal that killed it.
    seconds: Seconds from its start to its end.
    stdout: What it wrote to stdout.
    stderr: What it wrote to stderr.
  """

  status: int
  seconds: float
  stdout: str
  stderr: str


@functools.cache
def _fork_server() -> subprocess.Popen:
  """The process that starts commands. It lives as long as this one, since its imports take seconds."""
  command = [sys.executable, "-W", "ignore", "-c", _FORK_SERVER]
  server = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  atexit.register(server.communicate)  # The end of its stdin ends it.
  return server


def run_command(command: list[str], folder: Path, delay: float | None = None) -> Finished:
  """Runs `python -m vixml_jax.MODULE ARGUMENTS...` to its end.

  Args:
    command: [MODULE, *ARGUMENTS].
    folder: Folder for its logs, the files `stdout` and `stderr`.
    delay: Seconds until it receives SIGTERM; None for no signal.
  """
  server = _fork_server()
  assert server.stdin is not None and server.stdout is not None
  logs = folder / "stdout", folder / "stderr"
  print(json.dumps([command, list(map(str, logs)), delay]), file=server.stdin, flush=True)
  answer = server.stdout.readline()
  assert answer, "the process that starts commands has ended; see its stderr"
  return Finished(*json.loads(answer), *(log.read_text() for log in logs))
