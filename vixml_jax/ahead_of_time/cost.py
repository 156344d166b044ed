"""What one run of a compiled program costs a chip: FLOPs, traffic of its memory, collectives."""

from collections import Counter
from collections.abc import Iterator
import dataclasses
import functools
import math
import re

import numpy as np

from vixml_jax.ahead_of_time.hlo import Computation, Instruction, Module, parse

# Passes of the matrix unit, which multiplies bfloat16, for operands in float32.
_PASSES = {"highest": 6, "high": 3}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They name, split or wait; they move nothing.
_FREE = frozenset(
  (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "async-update",
    "opt-barrier",
  )
)
_VIEWS = frozenset(("bitcast", "reshape", "copy", "convert", "transpose"))


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between chips.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
    bytes: of the whole array on a chip: what comes out of an all-gather, what goes into a reduce-scatter.
    group: how many chips take part in it together.
  """

  kind: str
  bytes: int
  group: int

  @property
  def moved(self) -> float:
    """Bytes that each chip sends when its group forms a ring."""
    if self.kind == "collective-permute":
      return self.bytes
    share = (self.group - 1) / self.group
    return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass
class Cost:
  """What one run costs a chip.

  Attributes:
    flops: of matrix products and convolutions, a multiplication and an addition counted as two.
    unit_flops: the same, each weighted with its passes through a bfloat16 matrix unit.
    hbm_bytes: read from and written to HBM: operands and results of each kernel, of a slice only the slice.
    collectives: how often each is done.
    endless: loops whose number of turns the program does not tell; their bodies are counted once.
  """

  flops: float = 0.0
  unit_flops: float = 0.0
  hbm_bytes: float = 0.0
  collectives: dict[Collective, float] = dataclasses.field(default_factory=dict)
  endless: int = 0

  def add(self, other: "Cost", times: float = 1.0) -> None:
    """Adds another's cost, so many times."""
    self.flops += times * other.flops
    self.unit_flops += times * other.unit_flops
    self.hbm_bytes += times * other.hbm_bytes
    self.endless += other.endless
    for collective, count in other.collectives.items():
      self.collectives[collective] = self.collectives.get(collective, 0.0) + times * count

  @property
  def moved(self) -> float:
    """Bytes that a chip sends to others."""
    return sum(collective.moved * count for collective, count in self.collectives.items())


def program_cost(text: str, branch_share: float = 1.0) -> Cost:
  """Counts what a program does, the bodies of loops as often as they run.

  XLA's own analysis counts the body of a loop once.

  Args:
    text: optimized HLO, as `jax.stages.Compiled.as_text` returns it.
    branch_share: how often a condition takes its dearest branch; else it takes its cheapest.
  """
  return _Counter(parse(text), branch_share).cost


class _Counter:
  """Walks a module from its entry, each computation once."""

  def __init__(self, module: Module, branch_share: float):
    self._module = module
    self._branch_share = branch_share
    self._of_computation = functools.cache(self._count)

  @property
  def cost(self) -> Cost:
    """Of the whole module."""
    return self._of_computation(self._module.entry)

  def _count(self, name: str) -> Cost:
    computation, cost = self._module.computations[name], Cost()
    exchanges: dict[str, Collective] = {}
    for instruction in computation.instructions.values():
      if instruction.opcode == "while":
        self._add_loop(cost, computation, instruction)
      elif instruction.opcode == "conditional":
        self._add_branches(cost, instruction)
      elif instruction.opcode in ("call", "async-start"):
        cost.add(self._of_computation(instruction.called("to_apply") or instruction.called("calls")))
      else:
        for inner_computation, inner in self._inner(computation, instruction):
          flops, passes = _flops(inner_computation, inner)
          cost.flops += flops
          cost.unit_flops += flops * passes
          exchange = _exchange(inner_computation, inner, self._module.num_partitions)
          if exchange is not None:
            # One exchange may be spread over several fusions, which then share its channel.
            channel = inner.attribute(r"channel_id=(\d+)") if instruction.opcode == "fusion" else None
            exchanges[channel or inner.name] = exchange
        cost.hbm_bytes += self._traffic(computation, instruction)
    cost.add(Cost(collectives=dict(Counter(exchanges.values()))))
    return cost

  def _inner(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction, or what a fusion is made of."""
    if instruction.opcode != "fusion":
      yield computation, instruction
      return
    fused = self._module.computations[instruction.called("calls") or ""]
    for inner in fused.instructions.values():
      yield from self._inner(fused, inner)

  def _add_loop(self, cost: Cost, computation: Computation, loop: Instruction) -> None:
    turns = self._turns(computation, loop)
    cost.endless += turns is None
    cost.add(self._of_computation(loop.called("body")), 1 if turns is None else turns)

  def _turns(self, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop runs that counts from a constant up to a constant in constant steps; None for any other."""
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    condition = self._module.computations[loop.called("condition") or ""]
    test = condition.instructions[condition.root]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    start, end = (_value_at_start(condition, name, computation, loop) for name in test.operands)
    body = self._module.computations[loop.called("body") or ""]
    counter = condition.instructions[test.operands[0]].attribute(r"index=(\d+)")
    next_value = body.instructions[body.root].operands[int(counter or 0)]
    step = _step(body, next_value, counter or "0", computation, loop)
    if end is None or not step:
      return None
    return max(-(-(end - (start or 0)) // step), 0)

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

  def _traffic(self, computation: Computation, instruction: Instruction) -> float:
    """Bytes of HBM that an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
      return 0.0
    operands = list(computation.operands(instruction))
    if opcode == "copy-start":  # Source and destination come out of a start.
      return instruction.hbm_bytes
    if opcode in ("slice-start", "dynamic-slice-start"):
      target = instruction.arrays[len(operands[0].arrays)]
      return target.bytes * (1 + target.in_hbm)
    if opcode in ("dynamic-slice", "slice"):
      return instruction.bytes + instruction.hbm_bytes if operands[0].hbm_bytes else instruction.hbm_bytes
    if opcode == "dynamic-update-slice":
      return 2 * operands[1].hbm_bytes
    if opcode == "gather":
      return 2 * instruction.hbm_bytes + operands[1].hbm_bytes
    if opcode == "scatter":
      return 3 * operands[-1].hbm_bytes + operands[1].hbm_bytes
    if opcode != "fusion":
      return instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands)
    fused = self._module.computations[instruction.called("calls") or ""]
    read = sum(self._read(fused, number) for number, operand in enumerate(operands) if operand.hbm_bytes)
    return read + self._written(fused, fused.instructions[fused.root], instruction)

  def _read(self, fused: Computation, number: int) -> float:
    """Bytes that a fusion reads of one of its operands."""
    parameter = fused.parameter(number)
    return 0.0 if parameter is None else min(self._read_of(fused, parameter), parameter.bytes)

  def _read_of(self, fused: Computation, value: Instruction) -> float:
    total = 0.0
    for user in fused.users(value.name):
      first = user.operands[0] == value.name
      if user.opcode in ("dynamic-slice", "slice", "gather") and first:
        total += user.bytes
      elif user.opcode in ("dynamic-update-slice", "scatter") and first:
        continue  # Updated in place.
      elif user.opcode in _VIEWS:
        total += self._read_of(fused, user)
      elif user.opcode == "fusion":
        inner = self._module.computations[user.called("calls") or ""]
        total += sum(self._read(inner, place) for place, name in enumerate(user.operands) if name == value.name)
      else:
        return value.bytes
    return total

  def _written(self, fused: Computation, root: Instruction, fusion: Instruction) -> float:
    """Bytes that a fusion writes: of an array that it updates in place, the update."""
    if root.opcode == "tuple":
      parts = zip(fused.operands(root), fusion.arrays, strict=False)
      return sum(_update(fused, part) or array.bytes for part, array in parts if array.in_hbm)
    return (_update(fused, root) or fusion.bytes) if fusion.hbm_bytes else 0.0


def _update(fused: Computation, value: Instruction) -> float:
  """Bytes of the update where a value is an array updated in place, else 0."""
  while value.opcode in _VIEWS and value.operands[0] in fused.instructions:
    value = fused.instructions[value.operands[0]]
  if value.opcode in ("dynamic-update-slice", "scatter"):
    return fused.instructions[value.operands[-1 if value.opcode == "scatter" else 1]].bytes
  return 0.0


def _value_at_start(inside: Computation, name: str, computation: Computation, loop: Instruction) -> int | None:
  """The constant that a value inside a loop is, or is when the loop starts."""
  value = inside.instructions[name]
  if value.opcode == "get-tuple-element":
    before = computation.instructions[loop.operands[0]]
    if before.opcode != "tuple":
      return None
    value = computation.instructions[before.operands[int(value.attribute(r"index=(\d+)") or 0)]]
    while value.opcode in _VIEWS:
      value = computation.instructions[value.operands[0]]
  return int(value.text) if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.text) else None


def _step(body: Computation, name: str, counter: str, computation: Computation, loop: Instruction) -> int | None:
  """By how much a loop's body increases its counter; XLA unrolls loops, which then count in twos."""
  value = body.instructions[name]
  if value.opcode == "get-tuple-element" and value.attribute(r"index=(\d+)") == counter:
    return 0
  if value.opcode in _VIEWS:
    return _step(body, value.operands[0], counter, computation, loop)
  if value.opcode != "add":
    return _value_at_start(body, name, computation, loop) if value.opcode in ("constant", "get-tuple-element") else None
  parts = [_step(body, operand, counter, computation, loop) for operand in value.operands]
  return None if None in parts else sum(part or 0 for part in parts)


def _flops(computation: Computation, instruction: Instruction) -> tuple[float, int]:
  """FLOPs of a matrix product or convolution, and its passes through the matrix unit."""
  if instruction.opcode not in ("dot", "convolution"):
    return 0.0, 1
  left, right = computation.operands(instruction)
  precision = instruction.attribute(r"operand_precision=\{(\w+)")
  wide = left.arrays[0].dtype == right.arrays[0].dtype == "f32"
  passes = _PASSES.get(precision or "", 1) if wide else 1
  count = _dot_flops if instruction.opcode == "dot" else _convolution_flops
  return count(instruction, left.arrays[0].dims, right.arrays[0].dims), passes


def _dot_flops(dot: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
  contracted = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
  return 2.0 * math.prod(dot.arrays[0].dims) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)


def _convolution_flops(convolution: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
  """TPUs run matrix products, batched ones too, as convolutions; places where the window meets holes cost nothing."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
  if labels is None:
    raise ValueError(f"convolution without dim_labels: {convolution.attributes[:200]}")
  places = 1
  for axis in (label for label in labels[1] if label.isdigit()):
    places *= _window_places(
      _window(convolution, int(axis)), left[labels[1].index(axis)], convolution.arrays[0].dims[labels[3].index(axis)]
    )
  groups = int(convolution.attribute(r"batch_group_count=(\d+)") or 1)
  batch = left[labels[1].index("b")] // groups
  # The kernel's input features are those of one feature group already.
  return 2.0 * places * batch * right[labels[2].index("i")] * right[labels[2].index("o")]


def _window(convolution: Instruction, axis: int) -> dict[str, int]:
  """Size, stride, padding and dilations of the window along one spatial axis."""
  window = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
  text = convolution.attribute(r"window=\{([^}]*)\}") or ""
  for key, values in re.findall(r"(\w+)=([\dx_\-]+)", text):
    window[key] = int(values.split("x")[axis].split("_")[0])
  return window


def _window_places(window: dict[str, int], inputs: int, outputs: int) -> int:
  """How many pairs of an output place and a place of the window meet an input."""
  place = (
    np.arange(outputs)[:, None] * window["stride"] + np.arange(window["size"]) * window["rhs_dilate"] - window["pad"]
  )
  inside = (place >= 0) & (place <= (inputs - 1) * window["lhs_dilate"])
  return int((inside & (place % window["lhs_dilate"] == 0)).sum())


def _exchange(computation: Computation, instruction: Instruction, chips: int) -> Collective | None:
  """The collective that an instruction is or starts; None for any other instruction."""
  kind = instruction.opcode.removesuffix("-start")
  if kind not in _KINDS:
    return None
  group = _group_size(instruction, chips)
  size = sum(array.bytes for array in instruction.arrays if array.dims)
  if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"  # XLA writes it as an all-reduce of which each chip keeps a slice.
  elif kind == "reduce-scatter":
    size = sum(operand.bytes for operand in computation.operands(instruction))
  elif instruction.opcode in ("all-gather-start", "collective-permute-start"):  # Both source and result come out.
    size -= sum(operand.bytes for operand in computation.operands(instruction))
  return Collective(kind, int(size), group)


def _group_size(instruction: Instruction, chips: int) -> int:
  """How many chips exchange with each other, from any of the ways to write it."""
  text = instruction.attributes
  if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", text):
    return _path_length(dict(pair.split(",") for pair in pairs[1].split("},{")))
  if axes := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])  # `:(m)n` takes a part of n of an axis.
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
  return len(listed[1].split(",")) if listed else chips


def _path_length(target_of: dict[str, str]) -> int:
  """Over how many chips what the first one sends is passed on, if it is sent again and again."""
  first = chip = next(iter(target_of))
  length = 1
  while target_of.get(chip, first) != first:
    chip, length = target_of[chip], length + 1
  return length
