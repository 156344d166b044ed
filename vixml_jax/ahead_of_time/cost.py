"""Counts what one run of a compiled program costs a chip: FLOPs, HBM traffic and collectives."""

from collections import Counter
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import re
from types import MappingProxyType

from vixml_jax.ahead_of_time.collectives import Collective, collective_of
from vixml_jax.ahead_of_time.hbm_traffic import hbm_traffic
from vixml_jax.ahead_of_time.hlo import Computation, Instruction, Module, parse
from vixml_jax.ahead_of_time.loops import trip_count
from vixml_jax.ahead_of_time.matrix_flops import matrix_flops

_FEW_BITS = ("int8", "float8")


@dataclasses.dataclass
class Cost:
  """Cost of one run on one chip.

  Attributes:
    flops: FLOPs of matrix products and convolutions. A multiplication and an addition count as two.
    unit_flops: The same FLOPs, each multiplied by the number of bfloat16 products that take the same time.
    hbm_bytes: Bytes read from and written to HBM: operands and results of each kernel; for a slice, only the slice.
    kernels: Number of executions of each kernel, by its `unit_flops` and `hbm_bytes`, without asynchronous operations,
      which run beside the kernels.
    collectives: Number of executions of each collective.
    endless: Number of loops whose trip count is unknown. Their bodies are counted once.
    flops_by_kind: FLOPs of the products in int8 and float8, which `flops` includes, by kind.
  """

  flops: float = 0.0
  unit_flops: float = 0.0
  hbm_bytes: float = 0.0
  kernels: dict[tuple[float, float], float] = dataclasses.field(default_factory=dict)
  collectives: dict[Collective, float] = dataclasses.field(default_factory=dict)
  endless: int = 0
  flops_by_kind: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(self, other: "Cost", times: float = 1.0) -> None:
    """Adds another cost, multiplied by `times`."""
    self.flops += times * other.flops
    self.unit_flops += times * other.unit_flops
    self.hbm_bytes += times * other.hbm_bytes
    self.endless += other.endless
    for kind, flops in other.flops_by_kind.items():
      self.flops_by_kind[kind] = self.flops_by_kind.get(kind, 0.0) + times * flops
    for kernel, count in other.kernels.items():
      self.kernels[kernel] = self.kernels.get(kernel, 0.0) + times * count
    for collective, count in other.collectives.items():
      self.collectives[collective] = self.collectives.get(collective, 0.0) + times * count

  @property
  def moved(self) -> float:
    """Bytes that the chip sends to other chips."""
    return sum(collective.moved * count for collective, count in self.collectives.items())


def program_cost(
  text: str, branch_share: float = 1.0, product_cost: Mapping[str, float] = MappingProxyType({})
) -> Cost:
  """Returns the cost of a program, in which the body of a loop counts as often as it runs.

  XLA's own analysis counts the body of a loop once.

  Args:
    text: Optimized HLO, which `jax.stages.Compiled.as_text` returns.
    branch_share: Fraction of the runs of a conditional that take its most expensive branch. The others take the
      cheapest.
    product_cost: Time of a product of other operands relative to bfloat16; see `machine.Chip`.
  """
  return _Counter(parse(text), branch_share, product_cost).cost


class _Counter:
  """Counts a module from its entry; each computation is counted once and reused.

  Args:
    module: The program.
    branch_share: As in `program_cost`; so is `product_cost`.
  """

  def __init__(self, module: Module, branch_share: float, product_cost: Mapping[str, float]):
    self._module = module
    self._product_cost = product_cost
    self._branch_share = branch_share
    self._of_computation = functools.cache(self._count)

  @property
  def cost(self) -> Cost:
    """Cost of the whole module."""
    return self._of_computation(self._module.entry)

  def _count(self, name: str) -> Cost:
    computation, cost = self._module.computations[name], Cost()
    exchanges: dict[str, Collective] = {}
    for instruction in computation.instructions.values():
      if instruction.opcode == "while":
        self._add_loop(cost, computation, instruction)
      elif instruction.opcode == "conditional":
        self._add_branches(cost, instruction)
      elif instruction.opcode == "call":
        cost.add(self._of_computation(instruction.called("to_apply")))
      elif instruction.opcode == "async-start":
        cost.add(dataclasses.replace(self._of_computation(instruction.called("calls")), kernels={}))
      else:
        unit_flops = 0.0
        for inner_computation, inner in self._inner(computation, instruction):
          flops, kind = matrix_flops(inner_computation, inner)
          cost.flops += flops
          unit_flops += flops * (self._product_cost.get(kind, 1.0) if kind else 1.0)
          if kind in _FEW_BITS and flops:
            cost.flops_by_kind[kind] = cost.flops_by_kind.get(kind, 0.0) + flops
          exchange = collective_of(inner_computation, inner, self._module.num_partitions)
          if exchange is not None:
            # XLA may divide one collective among several fusions, which then share its channel.
            channel = inner.attribute(r"channel_id=(\d+)") if instruction.opcode == "fusion" else None
            exchanges[channel or inner.name] = exchange
        kernel = (unit_flops, hbm_traffic(self._module, computation, instruction))
        cost.unit_flops += kernel[0]
        cost.hbm_bytes += kernel[1]
        if any(kernel) and not instruction.opcode.endswith("-start"):
          cost.kernels[kernel] = cost.kernels.get(kernel, 0.0) + 1
    cost.add(Cost(collectives=dict(Counter(exchanges.values()))))
    return cost

  def _inner(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """Yields the instruction, or the instructions of a fusion, with their computation."""
    if instruction.opcode != "fusion":
      yield computation, instruction
      return
    fused = self._module.computations[instruction.called("calls")]
    for inner in fused.instructions.values():
      yield from self._inner(fused, inner)

  def _add_loop(self, cost: Cost, computation: Computation, loop: Instruction) -> None:
    trips = trip_count(self._module, computation, loop)
    cost.endless += trips is None
    cost.add(self._of_computation(loop.called("body")), 1 if trips is None else trips)

  def _add_branches(self, cost: Cost, instruction: Instruction) -> None:
    listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    names = (
      re.findall(r"%?([\w.\-]+)", listed)
      if listed
      else [instruction.called("true_computation"), instruction.called("false_computation")]
    )
    branches = sorted((self._of_computation(name) for name in names), key=lambda x: (x.flops, x.hbm_bytes))
    cost.add(branches[-1], self._branch_share)
    cost.add(branches[0], 1 - self._branch_share)
