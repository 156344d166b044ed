"""Counts the bytes that an instruction of a compiled program reads from and writes to the chip's HBM."""

from vixml_jax.ahead_of_time.hlo import VIEWS, Computation, Instruction, Module

# Opcodes that name, group or synchronize values, or call computations whose own instructions are counted.
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


def hbm_traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Returns the bytes of HBM that an instruction reads and writes; for a slice of an array, only the slice."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith("-done") or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
    return 0.0
  operands = list(computation.operands(instruction))
  if opcode == "copy-start":  # The result of a start includes source and destination.
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
  if opcode == "custom-call":  # The workspaces of cuBLAS and cuDNN, which are bytes, are counted as memory only.
    results = sum(array.bytes for array in instruction.arrays if array.in_hbm and array.dtype != "s8")
    return results + sum(operand.hbm_bytes for operand in operands)
  if opcode != "fusion":
    return instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands)
  fused = module.computations[instruction.called("calls")]
  read = sum(_read(module, fused, number) for number, operand in enumerate(operands) if operand.hbm_bytes)
  return read + _written(fused, fused.instructions[fused.root], instruction)


def _read(module: Module, fused: Computation, number: int) -> float:
  """Returns the bytes that a fusion reads of one of its operands."""
  parameter = fused.parameter(number)
  return 0.0 if parameter is None else min(_read_of(module, fused, parameter), parameter.bytes)


def _read_of(module: Module, fused: Computation, value: Instruction) -> float:
  total = 0.0
  for user in fused.users(value.name):
    first = user.operands[0] == value.name
    if user.opcode in ("dynamic-slice", "slice", "gather") and first:
      total += user.bytes
    elif user.opcode in ("dynamic-update-slice", "scatter") and first:
      continue  # It is updated in place.
    elif user.opcode in VIEWS:
      total += _read_of(module, fused, user)
    elif user.opcode == "fusion":
      inner = module.computations[user.called("calls")]
      total += sum(_read(module, inner, place) for place, name in enumerate(user.operands) if name == value.name)
    else:
      return value.bytes
  return total


def _written(fused: Computation, root: Instruction, fusion: Instruction) -> float:
  """Returns the bytes that a fusion writes; for an array that it updates in place, those of the update."""
  if root.opcode == "tuple":
    parts = zip(fused.operands(root), fusion.arrays, strict=False)
    return sum(_update(fused, part) or array.bytes for part, array in parts if array.in_hbm)
  return (_update(fused, root) or fusion.bytes) if fusion.hbm_bytes else 0.0


def _update(fused: Computation, value: Instruction) -> float:
  """Returns the bytes of the update if a value is an array that is updated in place, else 0."""
  while value.opcode in VIEWS and value.operands[0] in fused.instructions:
    value = fused.instructions[value.operands[0]]
  if value.opcode in ("dynamic-update-slice", "scatter"):
    return fused.instructions[value.operands[-1 if value.opcode == "scatter" else 1]].bytes
  return 0.0
