"""Searches for a mesh and a chunk size that fit a machine, nearest to those that a config asks for."""

from collections.abc import Callable
import logging
import math

from vixml_jax.ahead_of_time.compiling import Program
from vixml_jax.ahead_of_time.machine import Machine
from vixml_jax.ahead_of_time.plan import MeshPlan, Plan, all_mesh_plans, bytes_a_chip, halvings
from vixml_jax.ahead_of_time.programs import run_programs
from vixml_jax.ahead_of_time.workload import Workload
from vixml_jax.errors import InputError

_log = logging.getLogger(__name__)

_MAX_COMPILED = 6  # The search gives up after that many programs that did not fit.


def nearest_fit(
  workload: Workload, where: Machine, refused: Plan, program: Program, compile_program: Callable[[Plan], Program]
) -> tuple[Plan, Program] | None:
  """Returns the mesh plan nearest to a refused one whose training step fits the chips of a machine.

  The distance of two mesh plans is the number of doublings and halvings of their sizes between them. The memory of a
  plan is estimated first: its arguments exactly, its temporaries as those of the last compiled program, in proportion
  to the rows of a chunk that a chip encodes. A plan is left out if the arrays that any of its programs holds do not fit
  by themselves. The plans whose estimate fits are compiled, nearest first.

  Args:
    workload: Workload that does not fit.
    where: The machine.
    refused: Plan that does not fit.
    program: Training step of the refused plan.
    compile_program: Function that compiles a plan's training step.

  Returns:
    The plan and its training step; None if no plan fits, or none of the nearest ones.
  """
  asked = refused.mesh_plan
  sizes = halvings(asked.chunk_rows)
  candidates = sorted(
    all_mesh_plans(len(where.devices), sizes), key=lambda candidate: (_distance(candidate, asked), -candidate.data)
  )
  workloads = {rows: workload.with_chunk_rows(rows) for rows in sizes}  # Each of them packs its batch once.
  needs = _temporaries(refused, program)
  compiled = 0
  for candidate in candidates:
    if candidate == asked or compiled == _MAX_COMPILED:
      continue
    try:
      plan = Plan.of(workloads[candidate.chunk_rows], where, candidate)
    except InputError:  # A size of the model or the batch is not divisible by this mesh.
      continue
    estimate = bytes_a_chip(plan.train_arguments) + needs * _rows(candidate)
    if max(estimate, *(each.held for each in run_programs(plan))) > where.chip.hbm_bytes:
      continue
    _log.info("trying %s", candidate)
    compiled += 1
    program = compile_program(plan)
    if program.memory.total <= where.chip.hbm_bytes:
      return plan, program
    needs = _temporaries(plan, program)
  return None


def _distance(mesh_plan: MeshPlan, asked: MeshPlan) -> float:
  pairs = (
    (mesh_plan.data, asked.data),
    (mesh_plan.fsdp, asked.fsdp),
    (mesh_plan.tensor, asked.tensor),
    (mesh_plan.chunk_rows, asked.chunk_rows),
  )
  return sum(abs(math.log2(size / other)) for size, other in pairs)


def _rows(mesh_plan: MeshPlan) -> float:
  """Returns the number of rows of a chunk that a chip encodes."""
  return mesh_plan.chunk_rows / (mesh_plan.data * mesh_plan.fsdp)


def _temporaries(plan: Plan, program: Program) -> float:
  """Returns the bytes per row that a program needs in addition to its arguments."""
  return max(program.memory.total - bytes_a_chip(plan.train_arguments), 0.0) / _rows(plan.mesh_plan)
