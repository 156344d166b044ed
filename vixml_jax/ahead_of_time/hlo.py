"""Parses the text of a compiled program (HLO) into computations and instructions with the sizes of their arrays."""

from collections.abc import Iterator
import dataclasses
import math
import re

# Opcodes whose result has the elements of their operand, in another layout, shape or dtype.
VIEWS = frozenset(("bitcast", "reshape", "copy", "convert", "transpose"))

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
  """The type of one array.

  Attributes:
    dtype: Element type as HLO writes it, such as "bf16".
    dims: Size of each dimension.
    in_hbm: Whether the array is in the chip's main memory (HBM).
  """

  dtype: str
  dims: tuple[int, ...]
  in_hbm: bool

  @property
  def bytes(self) -> float:
    """Size in bytes, without padding."""
    return math.prod(self.dims) * _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0) / 8


def arrays_of(shape: str) -> list[ArrayShape]:
  """Returns the arrays of a shape or of a tuple of shapes.

  `S(n)` in a layout puts an array into another memory than HBM. Scalars are in registers, whatever their layout says.

  >>> [(array.dtype, array.dims, array.in_hbm) for array in arrays_of("(bf16[8,128]{1,0}, f32[16]{0:S(1)})")]
  [('bf16', (8, 128), True), ('f32', (16,), False)]
  """
  return [
    ArrayShape(dtype, tuple(int(size) for size in dims.split(",") if size), bool(dims) and "S(" not in layout)
    for dtype, dims, layout in _ARRAY.findall(shape)
  ]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction: `name = shape opcode(operands), attributes`.

  Attributes:
    name: Name of the instruction, unique in its computation.
    shape: Shape of the result, or a tuple of shapes.
    opcode: Operation, such as "dot".
    operands: Names of the instructions whose results it uses.
    text: Text between the parentheses of the operands: the value of a constant, the number of a parameter.
    attributes: Text after the operands.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  text: str
  attributes: str

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of `pattern` in the attributes; None if it does not match."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else None

  def called(self, key: str) -> str:
    """Returns the name of the computation of an attribute such as `calls` or `body`; "" if there is none."""
    return self.attribute(rf"\b{key}=%?([\w.\-]+)") or ""

  @property
  def arrays(self) -> list[ArrayShape]:
    """Arrays of the result."""
    return arrays_of(self.shape)

  @property
  def bytes(self) -> float:
    """Size of the result in bytes."""
    return sum(array.bytes for array in self.arrays)

  @property
  def hbm_bytes(self) -> float:
    """Size of the part of the result that is in HBM, in bytes."""
    return sum(array.bytes for array in self.arrays if array.in_hbm)


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions, such as a function, the body of a loop or a fusion.

  Attributes:
    name: Name of the computation.
    instructions: Instructions by name, in the order of execution.
    root: Name of the instruction whose result is that of the computation.
  """

  name: str
  instructions: dict[str, Instruction]
  root: str

  def operands(self, instruction: Instruction) -> Iterator[Instruction]:
    """Yields the instructions whose results an instruction uses."""
    return (self.instructions[name] for name in instruction.operands if name in self.instructions)

  def parameter(self, number: int) -> Instruction | None:
    """Returns the parameter with this number; None if there is none."""
    for instruction in self.instructions.values():
      if instruction.opcode == "parameter" and instruction.text.strip() == str(number):
        return instruction
    return None

  def users(self, name: str) -> list[Instruction]:
    """Returns the instructions that use a result."""
    return [instruction for instruction in self.instructions.values() if name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    computations: Computations by name.
    entry: Name of the computation that runs first.
    num_partitions: Number of chips that the program runs on.
  """

  computations: dict[str, Computation]
  entry: str
  num_partitions: int


def parse(text: str) -> Module:
  """Parses optimized HLO, which `jax.stages.Compiled.as_text` returns.

  Raises:
    ValueError: If a line is not an instruction of HLO.
  """
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
  """Parses the text to the right of `=`. The shape may be a tuple, which has parentheses of its own."""
  end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
  opcode = _OPCODE.match(line, end + 1)
  if opcode is None:
    raise ValueError(f"not an instruction of HLO: {line[:200]}")
  last = _closing(line, opcode.end() - 1)
  inside = line[opcode.end() : last]
  return Instruction(name, line[:end], opcode[1], tuple(_NAME.findall(inside)), inside, line[last + 1 :])


def _closing(line: str, start: int) -> int:
  """Returns the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for place in range(start, len(line)):
    depth += {"(": 1, ")": -1}.get(line[place], 0)
    if not depth:
      return place
  raise ValueError(f"not an instruction of HLO: {line[:200]}")
