"""Finds the collectives of a compiled program: kind, size and number of chips of each exchange."""

import dataclasses
import math
import re

from vixml_jax.ahead_of_time.hlo import Computation, Instruction

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between chips.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
    bytes: Size of the whole array on a chip: the result of an all-gather, the operand of a reduce-scatter.
    group: Number of chips that exchange with each other.
  """

  kind: str
  bytes: int
  group: int

  @property
  def moved(self) -> float:
    """Bytes that each chip sends if its group forms a ring.

    >>> Collective("all-reduce", bytes=1000, group=4).moved
    1500.0
    """
    if self.kind == "collective-permute":
      return self.bytes
    share = (self.group - 1) / self.group
    return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collective_of(computation: Computation, instruction: Instruction, chips: int) -> Collective | None:
  """Returns the collective that an instruction performs or starts; None for any other instruction.

  Args:
    computation: Computation of the instruction.
    instruction: Any instruction.
    chips: Number of chips that the program runs on.
  """
  kind = instruction.opcode.removesuffix("-start")
  if kind not in _KINDS:
    return None
  group = _group_size(instruction, chips)
  size = sum(array.bytes for array in instruction.arrays if array.dims)
  if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"  # XLA writes it as an all-reduce of which each chip keeps a slice.
  elif kind == "reduce-scatter":
    size = sum(operand.bytes for operand in computation.operands(instruction))
  elif instruction.opcode in ("all-gather-start", "collective-permute-start"):  # Their results include the operands.
    size -= sum(operand.bytes for operand in computation.operands(instruction))
  return Collective(kind, int(size), group)


def _group_size(instruction: Instruction, chips: int) -> int:
  """Returns the number of chips that exchange with each other, from any of HLO's notations."""
  text = instruction.attributes
  if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", text):
    return _path_length(dict(pair.split(",") for pair in pairs[1].split("},{")))
  if axes := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])  # `:(m)n` is a part of size n of an axis.
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
  return len(listed[1].split(",")) if listed else chips


def _path_length(target_of: dict[str, str]) -> int:
  """Returns the number of chips on the path that starts at the first chip and follows the pairs."""
  first = chip = next(iter(target_of))
  length = 1
  while target_of.get(chip, first) != first:
    chip, length = target_of[chip], length + 1
  return length
