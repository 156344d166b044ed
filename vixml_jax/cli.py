"""The frame of every entry point: flags, logging, joining the processes of a run, and one-line errors.

Entry points import little at module level: their flags, and this module. JAX, Flax, transformers and what needs them
take seconds to import, so `main` imports them when it is called. `--help` and errors in flags then come at once, and
the variables that JAX reads when it is imported can be set before (`messages.set_up`).
"""

from collections.abc import Callable, Sequence
import logging
import os
from pathlib import Path
import re
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags

from vixml_jax import command_help, joined_processes, messages, stopping
from vixml_jax.errors import InputError, Preempted, shown
from vixml_jax.files import disk_fault, path_problem
from vixml_jax.process_share import ProcessShare, joined_share
from vixml_jax.progress_lines import progress_lines
from vixml_jax.stages import ProgressBars, reporting

if TYPE_CHECKING:
  from jax.sharding import Mesh

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other processes of this run; for TPU pods, SLURM and other clusters that JAX detects by itself.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, for clusters that JAX does not detect; implies --distributed."
)
_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "Number of processes, with --coordinator; predict, encode and extract_features need no coordinator.",
  lower_bound=1,
)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.", lower_bound=0)


def run(
  main: Callable[[], None],
  arguments: Callable[[Sequence[str]], Sequence[str]] = list,
  *,
  divides: bool = False,
  saved: str = "nothing is saved",
  stopped: int = stopping.STATUS,
) -> None:
  """Parses flags and calls `main`.

  Bad input (`InputError`), errors in flags and a disk that is full or fails become one line on stderr and exit status
  1. A command that SIGTERM stops says in one line what is saved, and exits with 143 (`stopping`). An interrupt exits
  with 130, and the loss of another process with 75 (`joined_processes`). Any other exception is a bug and keeps its
  traceback.

  Args:
    main: The entry point.
    arguments: Returns the arguments to parse for those of the command line, of which the first is the program.
    divides: Whether its processes can divide the work without a coordinator; see `process_share`.
    saved: What is saved when SIGTERM stops the command, for its line.
    stopped: Exit status after SIGTERM.
  """

  def call(argv: Sequence[str]) -> None:
    try:
      if len(argv) > 1:
        raise InputError(f"{argv[1]!r}: not a flag; flags start with --")
      messages.set_up()
      _check_processes(divides)
      _join_processes()
      with reporting(ProgressBars()), progress_lines(), stopping.unwrapped():
        main()
    except InputError as error:
      _fail(str(error))
    except KeyboardInterrupt as stop:
      if str(stop):  # A training run says what it saved.
        print(stop, file=sys.stderr)
      sys.exit(128 + signal.SIGINT)
    except OSError as error:
      reason = disk_fault(error)
      if reason is None:
        raise
      _fail(f"{error.filename or 'a file'}: cannot be read or written ({reason}); check its disk, and start again")
    except Exception:
      if not joined_processes.are_joined():
        raise
      joined_processes.wait_for_loss()
      traceback.print_exc()
      joined_processes.leave(1)

  try:  # Around all of `stoppable`: the signal may arrive as soon as its handler is there.
    with stopping.stoppable(saved, stopped):
      app.run(call, flags_parser=lambda argv: _parse(arguments(argv)))
  except Preempted as stop:
    stopping.tell(str(stop))
    if joined_processes.are_joined():
      joined_processes.leave(stopped)
    sys.stdout.flush()
    os._exit(stopped)  # The end of the interpreter would wait for threads and take apart what libraries hold.


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses flags with absl; errors in flags and in config files become one line, and `--help` exits with 0."""
  if command_help.is_wanted(argv):
    command_help.show(command_help.text("__main__"))
    sys.exit(0)
  try:
    return flags.FLAGS([_with_home_folder(argument) for argument in argv])
  except flags.Error as error:
    _fail(_out_of_range(str(error)) or _shortened(_cause(str(error))))
  except OSError as error:
    _fail(_unreadable("config", error))
  except (KeyError, AttributeError, ValueError, TypeError, ImportError, SyntaxError) as error:
    _fail(_shortened(_missing_key(argv, str(error)) or f"--config: {type(error).__name__}: {error}"))


def _with_home_folder(argument: str) -> str:
  """Returns an argument such as --workdir=~/runs with the home folder in the place of ~, which shells leave there."""
  name, _, value = argument.partition("=")
  is_home = name.startswith("-") and (value == "~" or value.startswith("~/"))
  return f"{name}={Path(value).expanduser()}" if is_home else argument


def _out_of_range(message: str) -> str | None:
  """Returns an error that says what a key of the config may be, for absl's error about the type of its flag."""
  found = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
  if found is None:
    return None
  from vixml_jax.run.configuration.ranges import OF_ARCHITECTURES, rule_of

  rule = next(filter(None, (rule_of(found[1], architecture) for architecture in OF_ARCHITECTURES)), None)
  return None if rule is None else f"config.{found[1]}={shown(found[2])}: must be {rule.allowed}"


def _shortened(message: str) -> str:
  """Returns an error of absl without the middle of its longest words, which are values of flags."""
  return re.sub(r"\S{300,}", lambda found: f"{found[0][:100]}...{found[0][-20:]}", message)


def _cause(message: str) -> str:
  """Returns the error in a config file without the traceback that ml_collections puts into its message."""
  head, traceback, rest = message.partition("Traceback (most recent call last):")
  if not traceback:
    return message
  return f"{head.partition(': Error whilst')[0]}: {rest.strip().splitlines()[-1].strip()}"


def _unreadable(flag: str, error: OSError) -> str:
  """Returns the last line of ml_collections' error, which is that of the operating system, and what to do."""
  return f"--{flag}: {str(error).strip().splitlines()[-1].strip()}; use a config file such as configs/custom.py"


def _missing_key(argv: Sequence[str], message: str) -> str | None:
  """Returns an error that names the flag of a key that the config lacks; ml_collections names its last part only."""
  key, near = re.match(r"\W*(\w+)", message), re.search(r'Did you mean "(\w+)"', message)
  for name in (argument.partition("=")[0] for argument in argv):
    if key and key[1] in name.split(".")[1:]:
      return f"{name}: there is no such key; " + (f"did you mean {near[1]}?" if near else "see configs/common.py")
  return None


def _fail(message: str) -> NoReturn:
  """Prints one line on stderr and exits with status 1."""
  print("error: " + " ".join(message.split()), file=sys.stderr)
  sys.stderr.flush()
  # Threads and coroutines of libraries, abandoned by the error, would print tracebacks while the interpreter ends.
  sys.unraisablehook = lambda _: None
  threading.excepthook = lambda _: None
  if joined_processes.are_joined():
    joined_processes.leave(1)
  sys.exit(1)


def _check_processes(divides: bool) -> None:
  """Checks `--coordinator`, `--num_processes` and `--process` before any work."""
  if _COORDINATOR.value is not None:
    host, _, port = _COORDINATOR.value.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
      raise InputError(f"--coordinator={shown(_COORDINATOR.value)}: must be HOST:PORT of process 0")
  count, index = _PROCESSES.value, _PROCESS.value
  if count is None and index is None:
    return
  if count is None or index is None:
    given, other = ("num_processes", "process") if index is None else ("process", "num_processes")
    raise InputError(f"--{given}: must be given together with --{other}")
  if index >= count:
    raise InputError(f"--process={index}: must be 0 to {count - 1}, since --num_processes={count}")
  if not (divides or _COORDINATOR.value):
    raise InputError(f"--num_processes={count}: needs --coordinator=HOST:PORT, which joins the processes")


def process_share() -> ProcessShare:
  """Returns the share of this process: that of `jax.distributed`, or that of `--num_processes` and `--process`."""
  count, index = _PROCESSES.value, _PROCESS.value
  if _DISTRIBUTED.value or _COORDINATOR.value or count is None or index is None:
    return joined_share()
  return ProcessShare(index, count)


def _join_processes() -> None:
  if not _COORDINATOR.value and not _DISTRIBUTED.value:
    return
  import jax

  joined_processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if jax.process_index() > 0:
    logging.getLogger("vixml_jax").setLevel(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"


def show(text: str) -> None:
  """Prints a result on stdout at once, before what follows takes time or fails."""
  print(text, flush=True)


def required(flag: flags.FlagHolder[Any]) -> Any:
  """Returns the value of a flag that must be given.

  Raises:
    InputError: The flag is missing, or its config file cannot be read.
  """
  if flag.value is None:
    raise InputError(f"--{flag.name}: must be given; see --help")
  try:
    getattr(flag.value, "items", None)  # ml_collections raises the error of a file at the first access.
  except OSError as error:
    raise InputError(_unreadable(flag.name, error)) from error
  return flag.value


def local_path(place: str, flag: str) -> Path:
  """Returns the path of a place that must not be in a bucket.

  Raises:
    InputError: It is a URL, or cannot be a path; the message names the flag.
  """
  if "://" in place:
    raise InputError(f"--{flag}={place}: must be a local path; docs/inference.md#buckets says what may be in a bucket")
  if problem := path_problem(place):
    raise InputError(f"--{flag}={shown(place)}: {problem}")
  return Path(place)


def place(text: str, flag: str) -> str:
  """Returns a path or the URL of a bucket.

  Raises:
    InputError: It can be neither; the message names the flag.
  """
  if "://" not in text:
    return str(local_path(text, flag))
  if problem := path_problem(text):
    raise InputError(f"--{flag}={shown(text)}: {problem}")
  return text


def mesh(flag: flags.FlagHolder[str | None]) -> "Mesh | None":
  """Returns the mesh of a flag such as 4,1,2, of this process's devices; None if the flag is not given.

  Raises:
    InputError: The value is not three whole numbers, or does not fit the devices.
  """
  if not flag.value:
    return None
  import jax

  from vixml_jax import sharding

  data, fsdp, tensor = numbers(flag, 3)
  return sharding.make_mesh(data, fsdp, tensor, jax.local_devices())


def numbers(flag: flags.FlagHolder[Any], count: int | None = None) -> list[int]:
  """Returns the value of a flag as whole numbers that are separated by commas.

  Args:
    flag: The flag.
    count: How many numbers there must be; None for at least one.

  Raises:
    InputError: The value is something else; the message names the flag.
  """
  try:
    values = [int(part) for part in str(flag.value).split(",")]
  except ValueError:
    values = []
  if not values or len(values) != (count or len(values)):
    raise InputError(f"--{flag.name}={flag.value}: must be {count or 'some'} whole numbers separated by commas")
  return values
