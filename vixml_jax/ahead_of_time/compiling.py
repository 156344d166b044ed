"""Compiles the programs of a plan and measures what each needs of a chip's memory and what it costs."""

from collections.abc import Callable
import dataclasses
import logging
import re
import time
from typing import Any

import jax

from vixml_jax.ahead_of_time.chips import GIB
from vixml_jax.ahead_of_time.cost import Cost, program_cost
from vixml_jax.ahead_of_time.programs import Plan, bytes_a_chip

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
  """Bytes of a chip's memory while a program runs.

  Attributes:
    arguments: Arguments of the program.
    outputs: Results that do not reuse the memory of an argument.
    temporaries: Intermediate values; None if the compiler reports only the total.
    code: The program itself.
    others: Arrays of the run that the program does not use, but that stay in memory.
    total: Sum of the above.
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
    name: Name of the program.
    memory: Memory of each chip.
    cost: Cost of one run on each chip; None if the program was too large to compile.
    seconds: Time of the compilation.
  """

  name: str
  memory: ProgramMemory
  cost: Cost | None
  seconds: float


def compile_train(plan: Plan) -> Program:
  """Compiles the training step."""
  return _compile("train step", plan, plan.lower_train, bytes_a_chip(plan.train_arguments))


def compile_encode(plan: Plan) -> Program:
  """Compiles the step that embeds a chunk of items; the rest of the training state stays in memory."""
  rest = bytes_a_chip(plan.state) - bytes_a_chip(plan.state.params)
  return _compile("encode step", plan, plan.lower_encode, bytes_a_chip(plan.encode_arguments) + rest)


def refused_bytes(message: str) -> float | None:
  """Returns the bytes of HBM that a program needs, from the error with which the compiler refused it.

  >>> refused_bytes("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm.") / 2**30
  17.0

  Returns:
    Bytes on each chip; None for any other error.
  """
  if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
    return None
  found = re.search(r"(?:Used |required[^(]*\()(\d+(?:\.\d+)?)([KMGT]?)", message)
  return None if found is None else float(found[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[found[2]]


def _compile(name: str, plan: Plan, lower: Callable[[], jax.stages.Lowered], held: float) -> Program:
  """Compiles a program.

  Args:
    name: Name of the program.
    plan: The plan.
    lower: Lowers the program.
    held: Bytes that a chip holds while the program runs: its arguments and other arrays of the run.
  """
  _log.info("compiling the %s of %s; takes minutes for a large encoder", name, plan.workload.config.name)
  started = time.monotonic()
  try:
    compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    needed = refused_bytes(str(error))
    if needed is None:
      raise
    _log.info("the %s needs %.2f GiB of a chip, which is too much", name, needed / GIB)
    return Program(name, ProgramMemory(held, 0.0, None, 0.0, 0.0, max(needed, held)), None, time.monotonic() - started)
  seconds = time.monotonic() - started
  _log.info("compiled in %.0f s", seconds)
  cost = program_cost(compiled.as_text() or "", plan.filled)
  if cost.endless:
    _log.warning("the trip counts of %d loops of the %s are unknown; their bodies are counted once", cost.endless, name)
  return Program(name, _memory(compiled.memory_analysis(), held), cost, seconds)


def _memory(stats: Any, held: float) -> ProgramMemory:
  """Returns the memory of a program from XLA's account of it."""
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  others = max(held - stats.argument_size_in_bytes, 0)  # The compiler drops arguments that the program does not use.
  sizes = (stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes, others)
  return ProgramMemory(*sizes, total=sum(sizes))
