"""Searches for the mesh, the chunk size and the recomputation with which a machine trains fastest.

A compiled candidate has an expected time (`roofline`). Before that, every candidate has a lower bound of its expected
time, which follows from its sizes: the products that it cannot avoid, and what its chips must send. Candidates are
compiled in the order of that bound. The search ends when the best compiled step takes no longer than the bound of the
next candidate, so what it leaves out cannot be faster.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import itertools
import logging
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.ahead_of_time.compiling import Program, ProgramMemory
from vixml_jax.ahead_of_time.estimate import Estimate, estimate_train_step
from vixml_jax.ahead_of_time.machine import GIB, Machine
from vixml_jax.ahead_of_time.plan import Plan, all_mesh_plans, bytes_a_chip, halvings
from vixml_jax.ahead_of_time.programs import run_programs
from vixml_jax.ahead_of_time.roofline import model_flops
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
    bound: Lower bound of the expected seconds of a step.
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
    tried.append(Tried(candidate, estimate_train_step(candidate.plan, compile_program(candidate.plan))))
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
        " ".join(f"{key}={value}" for key, value in each.candidate.keys.items()),
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


def _candidates(workload: Workload, where: Machine) -> Iterator[Candidate]:
  """Yields the candidates whose arrays fit the chips."""
  asked = workload.config.train.chunk_rows
  # Chunks that are halved, and doubled until they hold the batch.
  rows = len(workload.batch.items.segments) * asked
  sizes = halvings(asked)
  sizes += itertools.takewhile(lambda size: size <= rows, (asked << i for i in itertools.count(1)))
  options = list(_recomputations(workload.config))
  # Each of them packs its batch once, for all meshes.
  workloads = {
    size: [(keys, workload.with_keys({"train.chunk_rows": size} | keys)) for keys in options] for size in sizes
  }
  for mesh_plan in all_mesh_plans(len(where.devices), sizes):
    for keys, changed in workloads[mesh_plan.chunk_rows]:
      try:
        plan = Plan.of(changed, where, mesh_plan)
      except InputError:  # A size of the model or the batch is not divisible by this mesh.
        break
      if max(each.held for each in run_programs(plan)) <= where.chip.hbm_bytes:
        yield Candidate(plan, keys, _bound(plan))


def _recomputations(config: ConfigDict) -> Iterator[dict[str, Any]]:
  """Yields the values of the keys that say what the backward pass recomputes; the config's own first."""
  yield {}
  if not config.encoder.remat:
    yield {"encoder.remat": True}
  elif config.encoder.remat_saved:  # Without recomputation, nothing is saved by name.
    yield {"encoder.remat": False, "encoder.remat_saved": ()}
  else:
    yield {"encoder.remat": False}


def _bound(plan: Plan) -> float:
  """Returns the seconds that a step takes at least: products at the expected rate, or what a chip must send."""
  workload, mesh = plan.workload, plan.mesh_plan
  config, items = workload.config, workload.batch.items
  lengths = item_lengths(items.segments)
  num_chunks = int(items.filled.sum())
  in_layers = num_chunks > 1 and config.train.chunks_in == "layer"
  products = model_flops(workload.model, lengths, train=True)
  if config.encoder.remat or in_layers:
    products += 2 * int(lengths.sum()) * _recomputed_weights(workload)
  if num_chunks > 1 and config.train.remat and not in_layers:
    products += model_flops(workload.model, lengths, train=False)
  compute = products / len(plan.where.devices) / (plan.where.chip.flops * plan.where.chip.efficiency)
  # Shards of the layers, forward and backward: those of the other chips come in, and its own is passed on as often.
  sent = 2 * num_chunks * (mesh.fsdp - 1) * _layer_bytes(plan)
  return max(compute, sent / plan.where.interconnect.ring_bandwidth(mesh.fsdp * mesh.tensor))


def _recomputed_weights(workload: Workload) -> int:
  """Returns the number of weights whose products are computed again where layers are recomputed.

  Nobody reads the result of a layer's last product again, and products that are saved by name are not computed again.
  """
  layers = engine.flatten_tree(workload.model.shapes["encoder"]["layers"])
  kept = {"down", *workload.config.encoder.remat_saved}
  return sum(
    leaf.size
    for name, leaf in layers.items()
    if name.endswith(("/kernel", "/lora_a", "/lora_b")) and name.split("/")[-2] not in kept
  )


def _layer_bytes(plan: Plan) -> float:
  """Returns the bytes of the encoder's layers on each chip."""
  return bytes_a_chip([tree.get("encoder", {}).get("layers", {}) for tree in (plan.state.params, plan.frozen)])
