"""What every entry point does around its one call: flags, logging, devices of several hosts, one-line errors."""

from collections.abc import Callable, Sequence
import logging
import os
import re
import signal
import sys
from typing import NoReturn

from absl import app, flags
import jax
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.errors import InputError, Preempted

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other processes of this run: set on TPU pods, SLURM and wherever JAX finds its cluster by itself.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, where JAX cannot find the cluster; implies --distributed."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes; with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "This process's number, from 0; with --coordinator.")


def run(main: Callable[[], None]) -> None:
  """Parses flags and calls `main`.

  Bad input (`InputError`) and what absl refuses become one line on stderr and status 1. A run that was
  preempted has saved itself and exits with 0, an interrupt exits with 130. Anything else is a bug and
  keeps its traceback.
  """

  def call(argv: Sequence[str]) -> None:
    try:
      if len(argv) > 1:
        raise InputError(f"{argv[1]!r}: not a flag; flags begin with --")
      _set_up_logging()
      _join_processes()
      main()
    except InputError as error:
      _fail(str(error))
    except Preempted as stop:
      print(stop, file=sys.stderr)
    except KeyboardInterrupt:
      sys.exit(128 + signal.SIGINT)

  app.run(call, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
  """absl's parser, with errors of flags and of config files on one line; `--help` is no error."""
  try:
    return flags.FLAGS(list(argv))
  except SystemExit:  # absl exits with 1 after it has printed the help that was asked for.
    sys.exit(0)
  except flags.Error as error:
    _fail(_cause(str(error)))
  except OSError as error:
    _fail(_unreadable("config", error))
  except (KeyError, AttributeError, ValueError, TypeError, ImportError, SyntaxError) as error:
    _fail(_missing_key(argv, str(error)) or f"--config: {type(error).__name__}: {error}")


def _cause(message: str) -> str:
  """What went wrong in a config file, without the traceback that ml_collections puts into its message."""
  head, traceback, rest = message.partition("Traceback (most recent call last):")
  if not traceback:
    return message
  return f"{head.partition(': Error whilst')[0]}: {rest.strip().splitlines()[-1].strip()}"


def _unreadable(flag: str, error: OSError) -> str:
  """The last line of ml_collections' error, which is the system's, and what to do."""
  return f"--{flag}: {str(error).strip().splitlines()[-1].strip()}; name a config file, such as configs/custom.py"


def _missing_key(argv: Sequence[str], message: str) -> str | None:
  """The flag that asks for a key which the config lacks, of which ml_collections says the last part only."""
  key, near = re.match(r"\W*(\w+)", message), re.search(r'Did you mean "(\w+)"', message)
  for name in (argument.partition("=")[0] for argument in argv):
    if key and key[1] in name.split(".")[1:]:
      return f"{name}: there is no such key; " + (f"did you mean {near[1]}?" if near else "see configs/common.py")
  return None


def _fail(message: str) -> NoReturn:
  """One line on stderr, status 1."""
  print("error: " + " ".join(message.split()), file=sys.stderr)
  sys.stderr.flush()
  sys.exit(1)


def _set_up_logging() -> None:
  """Plain lines on stderr: ours from INFO, libraries' from WARNING; the first process only."""
  logging.getLogger("absl").setLevel(logging.ERROR)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  root = logging.getLogger()
  root.handlers[:] = [handler]
  root.setLevel(logging.WARNING)
  logging.getLogger("vixml_jax").setLevel(logging.INFO)
  # Of a damaged checkpoint Orbax abandons all reads but the one that failed first; asyncio tells of each.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _join_processes() -> None:
  if _COORDINATOR.value:
    jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  elif _DISTRIBUTED.value:
    jax.distributed.initialize()
  if jax.process_index() > 0:
    logging.getLogger("vixml_jax").setLevel(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"


def required(flag: flags.FlagHolder):
  """The value of a flag that must be given.

  Raises:
    InputError: naming the flag, when it is missing or its config file cannot be read.
  """
  if flag.value is None:
    raise InputError(f"--{flag.name}: must be given; --help shows how")
  try:
    getattr(flag.value, "items", None)  # ml_collections keeps the error of a file until its config is touched.
  except OSError as error:
    raise InputError(_unreadable(flag.name, error)) from error
  return flag.value


def mesh(flag: flags.FlagHolder) -> Mesh | None:
  """The mesh of a flag such as 4,1,2; None where it is not given.

  Raises:
    InputError: naming the flag, or the axis at fault.
  """
  return sharding.make_mesh(*numbers(flag, 3)) if flag.value else None


def numbers(flag: flags.FlagHolder, count: int | None = None) -> list[int]:
  """A flag's value as whole numbers separated by commas, `count` of them where that is given.

  Raises:
    InputError: naming the flag.
  """
  try:
    values = [int(part) for part in flag.value.split(",")]
  except ValueError:
    values = []
  if not values or len(values) != (count or len(values)):
    raise InputError(f"--{flag.name}={flag.value}: must be {count or 'some'} whole numbers separated by commas")
  return values
