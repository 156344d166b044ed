"""The text of a compiled program (HLO) as computations of instructions, with the sizes of their arrays."""

from collections.abc import Iterator
import dataclasses
import math
import re

_BITS = {
  "pred": 8,
  "s4": 4,
  "u4": 4,
  "s8": 8,
  "u8": 8,
  "s16": 16,
  "u16": 16,
  "f16": 16,
  "bf16": 16,
  "s32": 32,
  "u32": 32,
  "f32": 32,
  "s64": 64,
  "u64": 64,
  "f64": 64,
  "c64": 64,
  "c128": 128,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class ArrayShape:
  """One array: its element type, its dimensions, and whether it lies in the chip's main memory (HBM)."""

  dtype: str
  dims: tuple[int, ...]
  in_hbm: bool

  @property
  def bytes(self) -> float:
    """Size without padding."""
    return math.prod(self.dims) * _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0) / 8


def arrays_of(shape: str) -> list[ArrayShape]:
  """The arrays of a shape or tuple of shapes.

  `S(n)` in a layout puts one into another memory than HBM; single numbers are in registers, whatever theirs says.
  """
  return [
    ArrayShape(dtype, tuple(int(size) for size in dims.split(",") if size), bool(dims) and "S(" not in layout)
    for dtype, dims, layout in _ARRAY.findall(shape)
  ]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = shape opcode(operands), attributes`."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  text: str  # What stands between the operands' parentheses: the value of a constant, the number of a parameter.
  attributes: str

  def attribute(self, pattern: str) -> str | None:
    """What the group of `pattern` finds in the attributes."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else None

  def called(self, key: str) -> str | None:
    """Name of the computation that an attribute such as `calls` or `body` names."""
    return self.attribute(rf"\b{key}=%?([\w.\-]+)")

  @property
  def arrays(self) -> list[ArrayShape]:
    """The arrays that come out."""
    return arrays_of(self.shape)

  @property
  def bytes(self) -> float:
    """Size of all that comes out."""
    return sum(array.bytes for array in self.arrays)

  @property
  def hbm_bytes(self) -> float:
    """Size of that part of it which lies in HBM."""
    return sum(array.bytes for array in self.arrays if array.in_hbm)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order in which they run, and the name of the last."""

  name: str
  instructions: dict[str, Instruction]
  root: str

  def operands(self, instruction: Instruction) -> Iterator[Instruction]:
    """The instructions whose results one takes."""
    return (self.instructions[name] for name in instruction.operands if name in self.instructions)

  def parameter(self, number: int) -> Instruction | None:
    """What stands for the caller's operand of this number."""
    for instruction in self.instructions.values():
      if instruction.opcode == "parameter" and instruction.text.strip() == str(number):
        return instruction
    return None

  def users(self, name: str) -> list[Instruction]:
    """The instructions that take a result."""
    return [instruction for instruction in self.instructions.values() if name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: its computations by name, the name of the first one, and over how many chips it runs."""

  computations: dict[str, Computation]
  entry: str
  num_partitions: int


def parse(text: str) -> Module:
  """Reads what `jax.stages.Compiled.as_text` returns."""
  computations: dict[str, Computation] = {}
  entry = name = root = ""
  instructions: dict[str, Instruction] = {}
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      name, instructions = head[2], {}
      entry = name if head[1] else entry
    elif line == "}":
      computations[name] = Computation(name, instructions, root)
    elif name and (found := _INSTRUCTION.match(line)):
      instructions[found[2]] = _instruction(found[2], found[3])
      root = found[2] if found[1] else root
  partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
  return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, line: str) -> Instruction:
  """Takes apart what stands right of `=`; the shape may be a tuple, with parentheses of its own."""
  end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
  opcode = _OPCODE.match(line, end + 1)
  if opcode is None:
    raise ValueError(f"no instruction of HLO: {line[:200]}")
  last = _closing(line, opcode.end() - 1)
  inside = line[opcode.end() : last]
  return Instruction(name, line[:end], opcode[1], tuple(_NAME.findall(inside)), inside, line[last + 1 :])


def _closing(line: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for place in range(start, len(line)):
    depth += {"(": 1, ")": -1}.get(line[place], 0)
    if not depth:
      return place
  raise ValueError(f"no instruction of HLO: {line[:200]}")
