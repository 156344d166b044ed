"""Counts the FLOPs of a single matrix product or convolution of a compiled program."""

import math
import re

import numpy as np

from vixml_jax.ahead_of_time.hlo import Computation, Instruction

# Passes through the matrix unit, which multiplies bfloat16, for operands in float32, by precision.
_PASSES = {"highest": 6, "high": 3}


def matrix_flops(computation: Computation, instruction: Instruction) -> tuple[float, int]:
  """Returns the FLOPs of an instruction and its number of passes through the matrix unit.

  A multiplication and an addition count as two. Instructions other than products and convolutions count as zero.
  """
  if instruction.opcode not in ("dot", "convolution"):
    return 0.0, 1
  left, right = computation.operands(instruction)
  precision = instruction.attribute(r"operand_precision=\{(\w+)")
  is_float32 = left.arrays[0].dtype == right.arrays[0].dtype == "f32"
  passes = _PASSES.get(precision or "", 1) if is_float32 else 1
  count = _dot_flops if instruction.opcode == "dot" else _convolution_flops
  return count(instruction, left.arrays[0].dims, right.arrays[0].dims), passes


def _dot_flops(dot: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
  del right  # Its contracted dimensions are those of the left operand.
  contracted = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
  return 2.0 * math.prod(dot.arrays[0].dims) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)


def _convolution_flops(convolution: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
  """Counts a convolution, which on TPUs may be a batched matrix product; window places over holes cost nothing."""
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
  # The kernel's dimension of input features is already that of one feature group.
  return 2.0 * places * batch * right[labels[2].index("i")] * right[labels[2].index("o")]


def _window(convolution: Instruction, axis: int) -> dict[str, int]:
  """Returns size, stride, padding and dilations of the window along one spatial axis."""
  window = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
  text = convolution.attribute(r"window=\{([^}]*)\}") or ""
  for key, values in re.findall(r"(\w+)=([\dx_\-]+)", text):
    window[key] = int(values.split("x")[axis].split("_")[0])
  return window


def _window_places(window: dict[str, int], inputs: int, outputs: int) -> int:
  """Returns the number of pairs of an output and a place of the window that read an input, not padding or a hole."""
  place = (
    np.arange(outputs)[:, None] * window["stride"] + np.arange(window["size"]) * window["rhs_dilate"] - window["pad"]
  )
  inside = (place >= 0) & (place <= (inputs - 1) * window["lhs_dilate"])
  return int((inside & (place % window["lhs_dilate"] == 0)).sum())
