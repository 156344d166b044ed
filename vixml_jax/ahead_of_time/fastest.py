"""Searches for the mesh, the chunk size and the recomputation with which a machine trains fastest.

Every candidate has a lower bound of its time, which follows from its sizes without compiling: the products that it
cannot avoid, and what its chips must send. Candidates are compiled in the order of that bound. The search ends when the
best compiled step takes no longer than the bound of the next candidate, so what it leaves out cannot be faster.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import itertools
import logging
from typing import Any

import jax

from vixml_jax.ahead_of_time.compiling import Program
from vixml_jax.ahead_of_time.machine import GIB, Machine
from vixml_jax.ahead_of_time.plan import MeshPlan, Plan, all_mesh_plans, bytes_a_chip, mesh_plan_of
from vixml_jax.ahead_of_time.programs import run_programs
from vixml_jax.ahead_of_time.roofline import Roofline, model_flops
from vixml_jax.ahead_of_time.workload import Workload, item_lengths
from vixml_jax.errors import InputError
from vixml_jax.text_columns import aligned
from vixml_jax.weights import engine

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run the training step.

  Attributes:
    plan: The step on the machine.
    keys: Values of the config that differ from the one that was asked for, by dotted key, mesh and chunk size left out.
    bound: Lower bound of the seconds of a step.
  """

  plan: Plan
  keys: Mapping[str, Any]
  bound: float

  @property
  def flags(self) -> str:
    """The flags that select this candidate."""
    return " ".join([self.plan.mesh_plan.flags, *(f"--config.{key}={value}" for key, value in self.keys.items())])


@dataclasses.dataclass(frozen=True)
class Tried:
  """A candidate that was compiled.

  Attributes:
    candidate: The candidate.
    program: Its training step.
    seconds: Lower bound of a step's time from the compiled program; None if it was too large to compile.
  """

  candidate: Candidate
  program: Program
  seconds: float | None

  @property
  def fits(self) -> bool:
    """Whether the step fits a chip."""
    return self.seconds is not None and self.program.memory.total <= self.candidate.plan.where.chip.hbm_bytes


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
  candidates = sorted(_candidates(workload, where), key=lambda candidate: candidate.bound)
  for number, candidate in enumerate(candidates):
    best = min((each.seconds for each in tried if each.fits and each.seconds is not None), default=None)
    if best is not None and candidate.bound >= best:
      _log.info("%d candidates are left out: none can be faster than %.3f s", len(candidates) - number, best)
      break
    if len(tried) == most:
      _log.info("%d candidates are left out: --search=%d are compiled", len(candidates) - number, most)
      break
    _log.info("candidate %d of %d: %s, at least %.3f s", number + 1, len(candidates), candidate.flags, candidate.bound)
    program = compile_program(candidate.plan)
    seconds = None if program.cost is None else Roofline.of(program.cost, where).seconds
    tried.append(Tried(candidate, program, seconds))
  return sorted(tried, key=lambda each: (not each.fits, each.seconds or 0.0))


def search_text(tried: list[Tried]) -> str:
  """Returns the compiled candidates as a table, and the flags of the fastest that fits."""
  where = tried[0].candidate.plan.where if tried else None
  if where is None:
    return "no candidate's arrays fit the chips. Use more chips, or chips with more memory."
  rows = [["mesh", "rows", "keys", "GiB", "fits", "at least, s", "compiled, s", "MFU, %"]]
  for each in tried:
    plan = each.candidate.plan
    mesh = plan.mesh_plan
    mfu = None if each.seconds is None else 100 * _needed(plan.workload) / len(where.devices) / where.chip.flops
    rows.append(
      [
        f"{mesh.data} x {mesh.fsdp} x {mesh.tensor}",
        f"{mesh.chunk_rows}",
        " ".join(f"{key}={value}" for key, value in each.candidate.keys.items()),
        f"{each.program.memory.total / GIB:.2f}",
        "yes" if each.fits else "NO",
        f"{each.candidate.bound:.4f}",
        "-" if each.seconds is None else f"{each.seconds:.4f}",
        "-" if mfu is None or each.seconds is None else f"{mfu / each.seconds:.1f}",
      ]
    )
  end = f"fastest that fits: {tried[0].candidate.flags}" if tried[0].fits else "none of them fits."
  return "\n".join([*aligned(rows), end])


def search_json(tried: list[Tried]) -> list[dict[str, Any]]:
  """Returns the compiled candidates, those that fit first, fastest first."""
  return [
    {
      "mesh_plan": dataclasses.asdict(each.candidate.plan.mesh_plan),
      "keys": dict(each.candidate.keys),
      "bound": each.candidate.bound,
      "seconds": each.seconds,
      "fits": each.fits,
      "memory": dataclasses.asdict(each.program.memory),
    }
    for each in tried
  ]


def _candidates(workload: Workload, where: Machine) -> Iterator[Candidate]:
  """Yields the candidates whose arrays fit the chips."""
  asked = mesh_plan_of(workload.config, where).chunk_rows
  # Chunks that are halved, and doubled until they hold the batch.
  sizes = [asked >> i for i in range(asked.bit_length()) if asked % (1 << i) == 0]
  rows = workload.batch.items.segments.shape[0] * asked
  sizes += list(itertools.takewhile(lambda size: size <= rows, (asked << i for i in itertools.count(1))))
  options = list(_recomputations(workload))
  packed = {size: workload.with_chunk_rows(size) for size in sizes}  # Each of them packs its batch once.
  for mesh_plan in all_mesh_plans(len(where.devices), sizes):
    for keys in options:
      changed = packed[mesh_plan.chunk_rows].with_keys(keys)
      try:
        plan = Plan.of(changed, where, mesh_plan)
      except InputError:  # A size of the model or the batch is not divisible by this mesh.
        break
      if max(each.held for each in run_programs(plan)) <= where.chip.hbm_bytes:
        yield Candidate(plan, keys, _bound(plan))


def _recomputations(workload: Workload) -> Iterator[dict[str, Any]]:
  """Yields the values of the keys that say what the backward pass recomputes; the config's own first."""
  own = bool(workload.config.encoder.remat)
  yield {}
  yield {"encoder.remat": not own}


def _needed(workload: Workload) -> float:
  """Returns the FLOPs that the items of a batch need on all chips together."""
  return model_flops(workload.model, item_lengths(workload.batch.items.segments), train=True)


def _bound(plan: Plan) -> float:
  """Returns the seconds that a step takes at least: products at the peak, or what a chip must send."""
  workload, mesh = plan.workload, plan.mesh_plan
  forward = model_flops(workload.model, item_lengths(workload.batch.items.segments), train=False)
  products = _needed(workload)
  if workload.config.encoder.remat:
    # Nobody reads the result of a layer's last product again, so it is not computed again.
    products += forward * (1 - _share_of_last_product(workload))
  if workload.config.train.remat and _num_chunks(workload) > 1:
    products += forward
  compute = products / len(plan.where.devices) / plan.where.chip.flops
  return max(compute, _sent(plan, mesh) / plan.where.interconnect.ring_bandwidth(mesh.fsdp * mesh.tensor))


def _share_of_last_product(workload: Workload) -> float:
  """Returns the share of the product `down` in the weights of a layer's products."""
  layers = engine.flatten_tree(workload.model.shapes["encoder"]["layers"])
  sizes = {name: leaf.size for name, leaf in layers.items() if name.endswith(("/kernel", "/lora_a", "/lora_b"))}
  return sum(size for name, size in sizes.items() if name.startswith("down/")) / sum(sizes.values())


def _num_chunks(workload: Workload) -> int:
  """Returns the number of chunks with items."""
  return int((workload.batch.items.segments > 0).any(axis=(1, 2)).sum())


def _sent(plan: Plan, mesh: MeshPlan) -> float:
  """Returns the bytes that a chip sends at least: shards of the layers, forward and backward."""
  layers = jax.tree.leaves(
    [tree.get("encoder", {}).get("layers", {}) for tree in (plan.state.params, plan.frozen)],
    is_leaf=lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
  )
  # The shards of the other chips come in, and its own shard is passed on as often.
  return 2.0 * _num_chunks(plan.workload) * (mesh.fsdp - 1) * bytes_a_chip(layers)
