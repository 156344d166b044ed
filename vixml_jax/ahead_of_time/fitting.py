"""Finds a mesh and a chunk size that fits: the nearest to what a config asks for, estimated first, then compiled."""

from collections.abc import Callable
import logging
import math

from vixml_jax.ahead_of_time.chips import Slice
from vixml_jax.ahead_of_time.compiling import Program
from vixml_jax.ahead_of_time.programs import Plan, Spread, Workload, all_spreads, bytes_a_chip
from vixml_jax.errors import InputError

_log = logging.getLogger(__name__)

_MOST_COMPILED = 6  # A search that has not found one by then is too far off.


def nearest_fit(
  workload: Workload, where: Slice, refused: Plan, program: Program, compile_program: Callable[[Plan], Program]
) -> tuple[Plan, Program] | None:
  """The spread nearest to a refused one whose training step fits the chips of a slice.

  Spreads are compared by how often a size must be doubled or halved to come from one to the other. What a spread needs
  is estimated first: its arguments exactly, its temporaries as those of the last program that was compiled, in
  proportion to the rows of a chunk that a chip encodes. Those that seem to fit are compiled, nearest first.

  Args:
    workload: what does not fit.
    where: the slice.
    refused: the plan that does not fit.
    program: its training step.
    compile_program: compiles a plan's training step.

  Returns:
    The plan and its training step; None if there is none, or none among the nearest.
  """
  asked = refused.spread
  halvings = [asked.chunk_rows >> i for i in range(asked.chunk_rows.bit_length()) if asked.chunk_rows % (1 << i) == 0]
  spreads = sorted(
    all_spreads(len(where.devices), halvings), key=lambda spread: (_distance(spread, asked), -spread.data)
  )
  workloads = {rows: workload.with_chunk_rows(rows) for rows in halvings}  # Each packs its batch once.
  needs = _temporaries(refused, program)
  compiled = 0
  for spread in spreads:
    if spread == asked or compiled == _MOST_COMPILED:
      continue
    try:
      plan = Plan.of(workloads[spread.chunk_rows], where, spread)
    except InputError:  # Something does not divide so.
      continue
    estimate = bytes_a_chip(plan.train_arguments) + needs * _rows(spread)
    if estimate > where.chip.hbm_bytes:
      continue
    _log.info("trying %s", spread)
    compiled += 1
    program = compile_program(plan)
    if program.memory.total <= where.chip.hbm_bytes:
      return plan, program
    needs = _temporaries(plan, program)
  return None


def _distance(spread: Spread, asked: Spread) -> float:
  pairs = (
    (spread.data, asked.data),
    (spread.fsdp, asked.fsdp),
    (spread.tensor, asked.tensor),
    (spread.chunk_rows, asked.chunk_rows),
  )
  return sum(abs(math.log2(size / other)) for size, other in pairs)


def _rows(spread: Spread) -> float:
  """Rows of a chunk that a chip encodes."""
  return spread.chunk_rows / (spread.data * spread.fsdp)


def _temporaries(plan: Plan, program: Program) -> float:
  """Bytes a row that a program needs beyond its arguments."""
  return max(program.memory.total - bytes_a_chip(plan.train_arguments), 0.0) / _rows(plan.spread)
