"""Compiles a plan's programs and says what each needs of a chip's memory, and costs it."""

from collections.abc import Callable
import dataclasses
import logging
import re
import time

import jax

from vixml_jax.ahead_of_time.chips import GIB
from vixml_jax.ahead_of_time.cost import Cost, program_cost
from vixml_jax.ahead_of_time.programs import Plan, bytes_a_chip

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a chip's memory while a program runs.

  Attributes:
    arguments: what the program is given.
    outputs: what comes out and does not take the place of an argument.
    temporaries: what the program needs besides; None where the compiler only says how much there is in all.
    code: the program itself.
    others: what lies there for other programs of the run.
    total: all of these.
  """

  arguments: float
  outputs: float
  temporaries: float | None
  code: float
  others: float
  total: float


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    name: of the program.
    memory: of each chip.
    cost: of one run on each chip; None where it was too large to compile.
    seconds: that compiling took.
  """

  name: str
  memory: Memory
  cost: Cost | None
  seconds: float


def compile_train(plan: Plan) -> Program:
  """The training step."""
  return _compile("train step", plan, plan.lower_train, bytes_a_chip(plan.train_arguments))


def compile_encode(plan: Plan) -> Program:
  """The step that embeds a chunk of items; the rest of the training state stays in memory meanwhile."""
  rest = bytes_a_chip(plan.state) - bytes_a_chip(plan.state.params)
  return _compile("encode step", plan, plan.lower_encode, bytes_a_chip(plan.encode_arguments) + rest)


def _compile(name: str, plan: Plan, lower: Callable[[], jax.stages.Lowered], held: float) -> Program:
  """Compiles a program beside which a chip holds so many bytes, the program's arguments among them."""
  _log.info("compiling the %s of %s: minutes for a large encoder", name, plan.workload.config.name)
  started = time.monotonic()
  try:
    compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    needed = _needed(str(error))
    if needed is None:
      raise
    _log.info("it needs %.2f GiB of a chip: too much", needed / GIB)
    return Program(name, Memory(held, 0.0, None, 0.0, 0.0, max(needed, held)), None, time.monotonic() - started)
  seconds = time.monotonic() - started
  _log.info("compiled in %.0f s", seconds)
  cost = program_cost(compiled.as_text() or "", plan.filled)
  if cost.endless:
    _log.warning("%d loops of the %s do not tell how often they run; their bodies are counted once", cost.endless, name)
  return Program(name, _memory(compiled.memory_analysis(), held), cost, seconds)


def _memory(stats, held: float) -> Memory:
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  others = max(held - stats.argument_size_in_bytes, 0)  # What a program does not use is no argument of it.
  sizes = (stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes, others)
  return Memory(*sizes, total=sum(sizes))


def _needed(message: str) -> float | None:
  """Bytes that a program needs by the error with which the compiler refused it; None for any other error."""
  if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
    return None
  found = re.search(r"(?:Used |required[^(]*\()(\d+(?:\.\d+)?)([KMGT]?)", message)
  return None if found is None else float(found[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[found[2]]
