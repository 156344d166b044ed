"""Searches for the mesh, the chunk size and the recomputation with which a machine trains fastest.

A compiled candidate has an expected time (`roofline`). Before that, every candidate has a lower bound of its expected
time (`candidates`), which follows from its sizes: the products that it cannot avoid, and what its chips must send.
Candidates are compiled in the order of that bound. The search ends when the best compiled step takes no longer than the
bound of the next candidate, so what it leaves out cannot be faster.
"""

from collections.abc import Callable
import dataclasses
import logging
from typing import Any

from vixml_jax.ahead_of_time.candidates import Candidate, candidates
from vixml_jax.ahead_of_time.compiling import Program, ProgramMemory
from vixml_jax.ahead_of_time.estimate import Estimate, estimate_train_step
from vixml_jax.ahead_of_time.machine import GIB, Machine
from vixml_jax.ahead_of_time.plan import Plan
from vixml_jax.ahead_of_time.workload import Workload
from vixml_jax.text_columns import aligned

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tried:
  """A candidate that was compiled.

  Attributes:
    candidate: The candidate.
    estimate: Its training step.
  """

  candidate: Candidate
  estimate: Estimate

  @property
  def seconds(self) -> float | None:
    """Expected time of a step, from the compiled program; None if it was too large to compile."""
    return None if self.estimate.roofline is None else self.estimate.roofline.expected

  @property
  def memory(self) -> ProgramMemory:
    """Memory of each chip."""
    return self.estimate.program.memory

  @property
  def fits(self) -> bool:
    """Whether the step fits a chip."""
    return self.seconds is not None and self.memory.total <= self.candidate.plan.where.chip.hbm_bytes

  @property
  def verdict(self) -> str:
    """Whether it fits, and what to expect, in words."""
    needs = f"needs {self.memory.total / GIB:.2f} of {self.candidate.plan.where.chip.hbm_bytes / GIB:.2f} GiB"
    return f"expected {self.seconds:.3f} s; {needs}" if self.fits else f"does not fit: {needs}"


def fastest_fit(
  workload: Workload, where: Machine, compile_program: Callable[[Plan], Program], most: int
) -> list[Tried]:
  """Compiles the candidates that may be fastest.

  Args:
    workload: The workload; its batch, optimizer and data are those of every candidate.
    where: The machine.
    compile_program: Function that compiles a plan's training step.
    most: Maximum number of candidates to compile.

  Returns:
    The compiled candidates, those that fit first, fastest first.
  """
  tried: list[Tried] = []
  listed = candidates(workload, where)
  for number, candidate in enumerate(listed):
    best = min((each.seconds for each in tried if each.fits and each.seconds is not None), default=None)
    if best is not None and candidate.bound >= best:
      _log.info("%d candidates are left out: none can be faster than %.3f s", len(listed) - number, best)
      break
    if len(tried) == most:
      _log.info("%d candidates are left out: --search=%d are compiled", len(listed) - number, most)
      break
    _log.info(
      "candidate %d of %d: %s; at least %.3f s and %.2f GiB",
      number + 1,
      len(listed),
      candidate.flags,
      candidate.bound,
      candidate.memory / GIB,
    )
    tried.append(Tried(candidate, estimate_train_step(candidate.plan, compile_program(candidate.plan))))
    _log.info("%s", tried[-1].verdict)
  return sorted(tried, key=lambda each: (not each.fits, each.seconds or 0.0))


def search_text(tried: list[Tried]) -> str:
  """Returns the compiled candidates as a table, and the flags of the fastest that fits."""
  if not tried:
    return "no candidate's arrays fit the chips. Use more chips, or chips with more memory."
  rows = [["mesh", "rows", "keys", "GiB", "fits", "before compiling, s", "lower bound, s", "expected, s", "MFU, %"]]
  for each in tried:
    plan, roofline = each.candidate.plan, each.estimate.roofline
    mesh = plan.mesh_plan
    rows.append(
      [
        f"{mesh.data} x {mesh.fsdp} x {mesh.tensor}",
        f"{mesh.chunk_rows}",
        " ".join(f"{key}={_short(value)}" for key, value in each.candidate.keys.items()),
        f"{each.memory.total / GIB:.2f}",
        "yes" if each.fits else "NO",
        f"{each.candidate.bound:.4f}",
        *(
          ["-"] * 3
          if roofline is None
          else [
            f"{roofline.lower_bound:.4f}",
            f"{roofline.expected:.4f}",
            f"{100 * each.estimate.utilization(plan.where, roofline.expected):.1f}",
          ]
        ),
      ]
    )
  end = f"fastest that fits: {tried[0].candidate.flags}" if tried[0].fits else "none of them fits."
  return "\n".join([*aligned(rows), end])


def _short(value: Any) -> str:
  """Returns the value of a key for the table."""
  return ",".join(value) or "()" if isinstance(value, tuple) else f"{value}"


def search_json(tried: list[Tried]) -> list[dict[str, Any]]:
  """Returns the compiled candidates, those that fit first, fastest first."""
  return [
    {
      "mesh_plan": dataclasses.asdict(each.candidate.plan.mesh_plan),
      "keys": dict(each.candidate.keys),
      "bound": each.candidate.bound,
      "seconds": each.estimate.roofline and each.estimate.roofline.lower_bound,
      "expected": each.seconds,
      "fits": each.fits,
      "memory": dataclasses.asdict(each.memory),
    }
    for each in tried
  ]
