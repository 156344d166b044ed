"""Compiles the programs of a plan and measures what each needs of a chip's memory and what it costs."""

from collections.abc import Sequence
import dataclasses
import logging
import re
import time
from typing import Any

import jax

from vixml_jax.ahead_of_time.cost import Cost, program_cost
from vixml_jax.ahead_of_time.machine import GIB
from vixml_jax.ahead_of_time.plan import Plan
from vixml_jax.ahead_of_time.program_parts import RunProgram
from vixml_jax.ahead_of_time.progress import compiling

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


def compile_program(plan: Plan, program: RunProgram, to_come: Sequence[str] = ()) -> Program:
  """Compiles a program.

  Args:
    plan: The plan that the program belongs to.
    program: The program.
    to_come: Names of the programs that are compiled after it, for lines about the progress.
  """
  started = time.monotonic()
  try:
    with compiling(program.name, to_come):
      compiled = program.lower().compile(dict(plan.where.compiler_options))
  except jax.errors.JaxRuntimeError as error:
    needed = refused_bytes(str(error))
    if needed is None:
      raise
    # The compiler counts the program's own arguments, but not the other arrays of the run.
    _log.info("%s needs %.2f GiB of a chip, which is too much", program.name, needed / GIB)
    memory = ProgramMemory(program.held, 0.0, None, 0.0, 0.0, max(needed, program.held))
    return Program(program.name, memory, None, time.monotonic() - started)
  seconds = time.monotonic() - started
  share = plan.filled if program.work is not None and program.work.trains else 1.0
  cost = program_cost(compiled.as_text() or "", share, plan.where.chip.product_cost)
  return Program(program.name, _memory(compiled.memory_analysis(), program.held), cost, seconds)


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


def _memory(stats: Any, held: float) -> ProgramMemory:
  """Returns the memory of a program from XLA's account of it."""
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  others = max(held - stats.argument_size_in_bytes, 0)  # The compiler drops arguments that the program does not use.
  sizes = (stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes, others)
  return ProgramMemory(*sizes, total=sum(sizes))
