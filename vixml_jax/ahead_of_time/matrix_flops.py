"""Counts the FLOPs of a single matrix product or convolution of a compiled program."""

import math
import re

import numpy as np

from vixml_jax.ahead_of_time.hlo import Computation, Instruction

_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
_CONVOLUTION = "__cudnn$conv"
_ATTENTION = "__cudnn$fmha"
# The name of a call of splash attention on TPUs contains that of its kernel: forward, gradients of all, or of queries.
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)")
# Products of scores and values in the forward pass; in the backward pass, the scores again and four gradients.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


def matrix_flops(computation: Computation, instruction: Instruction) -> tuple[float, str | None]:
  """Returns the FLOPs of an instruction, and the kind of its operands if they are neither bfloat16 nor float16.

  A multiplication and an addition count as two. On GPUs, products are calls of cuBLAS and cuDNN, and on TPUs attention
  may be a call of a kernel. Instructions other than products, convolutions and attention count as zero.

  Returns:
    FLOPs, and "int8", "float8", or for float32 the precision: "default", "high" or "highest".
  """
  if instruction.opcode == "custom-call":
    return _call_flops(computation, instruction)
  if instruction.opcode not in ("dot", "convolution"):
    return 0.0, None
  left, right = computation.operands(instruction)
  contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
  precision = instruction.attribute(r"operand_precision=\{(\w+)")
  if instruction.opcode == "dot":
    flops = _dot_flops(instruction, left.arrays[0].dims, contracted)
  else:
    flops = _convolution_flops(instruction, left.arrays[0].dims, right.arrays[0].dims)
  return flops, _kind(left, right, precision)


def _kind(left: Instruction, right: Instruction, precision: str | None) -> str | None:
  dtypes = {operand.arrays[0].dtype for operand in (left, right)}
  if dtypes == {"s8"}:
    return "int8"
  if all(dtype.startswith("f8") for dtype in dtypes):
    return "float8"
  return (precision or "default").lower() if dtypes == {"f32"} else None


def _call_flops(computation: Computation, call: Instruction) -> tuple[float, str | None]:
  """Counts a call of cuBLAS, cuDNN or splash attention; other calls count as zero.

  The result of a call of cuBLAS or cuDNN is followed by its workspace.
  """
  target = call.attribute(r'custom_call_target="([^"]*)"') or ""
  operands = list(computation.operands(call))
  if target.startswith(_CUBLAS):
    left, right = operands[:2]
    contracted = call.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
    precision = call.attribute(r'"operand_precision":\["(\w+)"')
    return _dot_flops(call, left.arrays[0].dims, contracted.replace('"', "")), _kind(left, right, precision)
  if target.startswith(_CONVOLUTION):
    left, right = operands[:2]
    return _convolution_flops(call, left.arrays[0].dims, right.arrays[0].dims), _kind(left, right, None)
  if target.startswith(_ATTENTION):
    return _attention_flops(call, operands[0].arrays[0].dims, "Backward" in target), None
  splash = _SPLASH.match(call.name)
  if splash is not None and target == "tpu_custom_call":
    return _splash_flops(operands, splash[1] != "fwd")
  return 0.0, None


def _attention_flops(call: Instruction, queries: tuple[int, ...], backward: bool) -> float:
  """Counts attention, given the shape of the queries; the call names the shape [B, H, T, S] of the scores."""
  scores = call.attribute(r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]') or ""
  products = _BACKWARD_PRODUCTS if backward else _FORWARD_PRODUCTS
  return 2.0 * products * math.prod(int(size) for size in re.findall(r"\d+", scores) or [0]) * queries[-1]


def _splash_flops(operands: list[Instruction], backward: bool) -> tuple[float, str | None]:
  """Counts splash attention, whose operands of floating point begin with queries [R, H, T, D] and keys [R, G, S, D].

  All blocks of the scores are counted. With causal attention, the kernel skips the blocks above the diagonal of a row
  that is longer than one block.
  """
  queries, keys = [operand for operand in operands if operand.arrays[0].dtype in ("bf16", "f32")][:2]
  products = _BACKWARD_PRODUCTS if backward else _FORWARD_PRODUCTS
  flops = 2.0 * products * math.prod(queries.arrays[0].dims) * keys.arrays[0].dims[-2]
  return flops, _kind(queries, keys, None)


def _dot_flops(dot: Instruction, left: tuple[int, ...], contracted: str) -> float:
  """Counts a product; `contracted` are the axes of the left operand that are summed over, separated by commas."""
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
