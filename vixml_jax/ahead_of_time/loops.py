"""Finds how often the loops of a compiled program run."""

import re

from vixml_jax.ahead_of_time.hlo import VIEWS, Computation, Instruction, Module


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """Returns the number of iterations of a `while`; None if the program does not show it.

  Args:
    module: The program.
    computation: Computation of the loop.
    loop: Instruction with opcode `while`. If XLA has not annotated its trip count, it must count from a constant to a
      constant in constant steps.
  """
  known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
  if known:
    return int(known)
  condition = module.computations[loop.called("condition")]
  test = condition.instructions[condition.root]
  if test.opcode != "compare" or "direction=LT" not in test.attributes:
    return None
  start, end = (_value_at_start(condition, name, computation, loop) for name in test.operands)
  body = module.computations[loop.called("body")]
  counter = condition.instructions[test.operands[0]].attribute(r"index=(\d+)")
  next_value = body.instructions[body.root].operands[int(counter or 0)]
  step = _step(body, next_value, counter or "0", computation, loop)
  if end is None or not step:
    return None
  return max(-(-(end - (start or 0)) // step), 0)


def _value_at_start(inside: Computation, name: str, computation: Computation, loop: Instruction) -> int | None:
  """Returns the constant that a value inside a loop equals, always or before the first iteration."""
  value = inside.instructions[name]
  if value.opcode == "get-tuple-element":
    before = computation.instructions[loop.operands[0]]
    if before.opcode != "tuple":
      return None
    value = computation.instructions[before.operands[int(value.attribute(r"index=(\d+)") or 0)]]
    while value.opcode in VIEWS:
      value = computation.instructions[value.operands[0]]
  return int(value.text) if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.text) else None


def _step(body: Computation, name: str, counter: str, computation: Computation, loop: Instruction) -> int | None:
  """Returns by how much a loop's body increases its counter. It is 2 or more if XLA has unrolled the loop."""
  value = body.instructions[name]
  if value.opcode == "get-tuple-element" and value.attribute(r"index=(\d+)") == counter:
    return 0
  if value.opcode in VIEWS:
    return _step(body, value.operands[0], counter, computation, loop)
  if value.opcode != "add":
    return _value_at_start(body, name, computation, loop) if value.opcode in ("constant", "get-tuple-element") else None
  parts = [_step(body, operand, counter, computation, loop) for operand in value.operands]
  return None if None in parts else sum(part or 0 for part in parts)
