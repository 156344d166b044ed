"""What all programs of a plan need and cost: memory, rooflines, number of runs."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import logging

from vixml_jax.ahead_of_time.compiling import Program
from vixml_jax.ahead_of_time.host_memory import host_memory
from vixml_jax.ahead_of_time.machine import GIB, Machine
from vixml_jax.ahead_of_time.plan import Plan
from vixml_jax.ahead_of_time.program_parts import RunProgram
from vixml_jax.ahead_of_time.programs import ENCODE_STEP, TRAIN_STEP, run_programs
from vixml_jax.ahead_of_time.roofline import Roofline, model_flops

_log = logging.getLogger(__name__)

Compiler = Callable[[Plan, RunProgram, Sequence[str]], Program]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Cost and time of a program on a machine.

  Attributes:
    program: The compiled program.
    roofline: Lower bounds of its time, and the expected time; None if it was too large to compile.
    runs: Number of runs.
    model_flops: FLOPs that the items of one run need on all chips together, without any recomputation; 0 for a program
      without encoder.
    items: Number of items that one run encodes.
    tokens: Number of tokens of these items.
  """

  program: Program
  roofline: Roofline | None
  runs: float
  model_flops: float = 0.0
  items: float = 0.0
  tokens: float = 0.0

  def utilization(self, where: Machine, seconds: float) -> float:
    """Returns the model's FLOPs as a share of what the chips can do in the time of a run."""
    return self.model_flops / len(where.devices) / where.chip.flops / seconds

  @property
  def hours(self) -> float | None:
    """Hours of all runs at the lower bound; None if the program was too large to compile."""
    return None if self.roofline is None else self.runs * self.roofline.lower_bound / 3600

  @property
  def expected_hours(self) -> float | None:
    """Expected hours of all runs; None if the program was too large to compile."""
    return None if self.roofline is None else self.runs * self.roofline.expected / 3600


@dataclasses.dataclass(frozen=True)
class Report:
  """All programs of a run on a machine.

  Attributes:
    plan: The plan.
    estimates: The programs, in the order in which they first run.
    host_memory: Bytes that a process keeps on its host, by what they are for.
  """

  plan: Plan
  estimates: list[Estimate]
  host_memory: dict[str, float]

  def find(self, name: str) -> Estimate:
    """Returns the estimate of a program by its name."""
    return next(estimate for estimate in self.estimates if estimate.program.name == name)

  @property
  def train(self) -> Estimate:
    """Training step."""
    return self.find(TRAIN_STEP)

  @property
  def encode(self) -> Estimate:
    """The program that embeds the training queries after the last epoch, when most is in memory."""
    return self.find(ENCODE_STEP)

  @property
  def largest(self) -> Estimate:
    """The program that needs most memory."""
    return max(self.estimates, key=lambda estimate: estimate.program.memory.total)

  @property
  def fits(self) -> bool:
    """Whether all programs fit into the memory of a chip."""
    return self.largest.program.memory.total <= self.plan.where.chip.hbm_bytes

  @property
  def hours(self) -> float | None:
    """Hours of the whole run at the lower bounds; None if a program was too large to compile."""
    return _sum(estimate.hours for estimate in self.estimates)

  @property
  def expected_hours(self) -> float | None:
    """Expected hours of the whole run; None if a program was too large to compile."""
    return _sum(estimate.expected_hours for estimate in self.estimates)


def _sum(values: Iterable[float | None]) -> float | None:
  """Returns the sum of the values; None if one of them is None."""
  total = 0.0
  for value in values:
    if value is None:
      return None
    total += value
  return total


def estimate_run(plan: Plan, compiler: Compiler, compiled: Iterable[Program] = ()) -> Report:
  """Compiles all programs of a plan and estimates their cost.

  Args:
    plan: The plan.
    compiler: Function that compiles a program of a plan.
    compiled: Programs of this plan that are compiled already.
  """
  programs = run_programs(plan)
  fullest = max(programs, key=lambda program: program.held)
  if fullest.held > plan.where.chip.hbm_bytes:
    _log.warning(
      "does not fit: the arrays in memory during %s take %.2f GiB of a chip; the table follows when all programs are "
      "compiled",
      fullest.name,
      fullest.held / GIB,
    )
  largest: dict[object, RunProgram] = {}
  for program in programs:
    key = program.key or program.name
    if key not in largest or program.rows > largest[key].rows:
      largest[key] = program
  known = {program.name: program for program in compiled}
  missing = [
    program for program in programs if largest[program.key or program.name] is program and program.name not in known
  ]
  for number, program in enumerate(missing):
    known[program.name] = compiler(plan, program, [each.name for each in missing[number + 1 :]])
  estimates = []
  for program in programs:
    source = largest[program.key or program.name]
    estimates.append(_estimate(plan, program, _in_place_of(known[source.name], source, program)))
  return Report(plan, estimates, host_memory(plan))


def _in_place_of(compiled: Program, source: RunProgram, program: RunProgram) -> Program:
  """Returns a compiled program, `source`, as another one with the same key."""
  if source is program:
    return compiled
  memory = compiled.memory
  if compiled.cost is None:  # It was refused, so only its total is known.
    total = max(memory.total - source.rows + program.rows, program.held)
    memory = dataclasses.replace(memory, arguments=program.held, total=total)
  else:
    arguments = memory.arguments - source.rows + program.rows
    others = max(program.held - arguments, 0.0)
    beside = memory.total - memory.arguments - memory.others
    memory = dataclasses.replace(memory, arguments=arguments, others=others, total=arguments + beside + others)
  return dataclasses.replace(compiled, name=program.name, memory=memory, seconds=0.0)


def compile_train_step(plan: Plan, compiler: Compiler) -> Program:
  """Compiles the training step of a plan only."""
  return compiler(plan, _train_step(plan), ())


def estimate_train_step(plan: Plan, compiled: Program) -> Estimate:
  """Returns the cost and time of a plan's compiled training step."""
  return _estimate(plan, _train_step(plan), compiled)


def _train_step(plan: Plan) -> RunProgram:
  return next(program for program in run_programs(plan) if program.name == TRAIN_STEP)


def _estimate(plan: Plan, program: RunProgram, compiled: Program) -> Estimate:
  roofline = None if compiled.cost is None else Roofline.of(compiled.cost, plan.where)
  work = program.work
  if work is None:
    return Estimate(compiled, roofline, program.runs)
  needed = model_flops(plan.workload.model, work.lengths, work.trains) * work.items / len(work.lengths)
  return Estimate(compiled, roofline, program.runs, needed, work.items, work.tokens)
