"""Builds the graph of an ONNX model node by node."""

from typing import Any

import numpy as np

from vixml_jax.onnx_models.libraries import import_library

# The first set of operators that has Gelu. ONNX Runtime reads it and this version of the format since 1.17.
_OPSET, _IR_VERSION = 20, 9


class Graph:
  """Nodes and constants of a graph. Values are strings: the names of what nodes compute, of constants and of inputs."""

  def __init__(self) -> None:
    self._onnx = import_library("onnx")
    self._nodes: list[Any] = []
    self._constants: dict[str, np.ndarray] = {}
    self._inputs: list[Any] = []
    self._outputs: list[Any] = []

  def input(self, name: str, dtype: type, shape: tuple[str | int, ...]) -> str:
    """Declares an input and returns its name.

    Args:
      name: Name of the input.
      dtype: Type of its elements.
      shape: Sizes of its dimensions, or names of those that vary.
    """
    self._inputs.append(self._value(name, dtype, shape))
    return name

  def output(self, name: str, value: str, shape: tuple[str | int, ...]) -> None:
    """Declares a value as an output of float32."""
    self._nodes.append(self._onnx.helper.make_node("Identity", [value], [name], name))
    self._outputs.append(self._value(name, np.float32, shape))

  def constant(self, name: str, value: np.ndarray) -> str:
    """Adds a constant and returns its name, such as the path of a parameter."""
    self._constants[name] = value
    return name

  def integers(self, *values: int) -> str:
    """Returns a constant vector, int64, which nodes with the same numbers share."""
    return self.constant(f"integers {' '.join(map(str, values))}", np.array(values, np.int64))

  def number(self, value: float) -> str:
    """Returns a constant number, float32, which nodes with the same number share."""
    return self.constant(f"number {value!r}", np.array(value, np.float32))

  def apply(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
    """Adds a node and returns the value that it computes.

    Args:
      operator: Name of the operator in ONNX.
      *inputs: Values that it takes.
      name: Name of the node and of its value; made up by default.
      **attributes: Attributes of the operator.
    """
    name = name or f"{operator}_{len(self._nodes)}"
    self._nodes.append(self._onnx.helper.make_node(operator, inputs, [name], name, **attributes))
    return name

  def as_float(self, value: str) -> str:
    """Returns a value as float32."""
    return self.cast(value, np.float32)

  def cast(self, value: str, dtype: type) -> str:
    """Returns a value with another type of its elements."""
    return self.apply("Cast", value, to=self._type(dtype))

  def linear(self, name: str, x: str, kernel: np.ndarray, bias: np.ndarray) -> str:
    """Returns x W + b; the node of the product is called NAME/product."""
    product = self.apply("MatMul", x, self.constant(f"{name}/kernel", kernel), name=f"{name}/product")
    return self.apply("Add", product, self.constant(f"{name}/bias", bias), name=name)

  def linear_by_row(self, name: str, x: str, kernel: np.ndarray, bias: np.ndarray) -> str:
    """Returns what `linear` does; the product is that of x with each row divided by its largest value.

    The values of x are outputs of GELU, which are above -0.2: afterwards, all are between -1 and 1.
    """
    largest = self.apply("Max", self.apply("ReduceMax", x, self.integers(1), keepdims=1), self.number(0.2))
    scaled = self.apply("Div", x, largest)
    product = self.apply("MatMul", scaled, self.constant(f"{name}/kernel", kernel), name=f"{name}/product")
    return self.apply("Add", self.apply("Mul", product, largest), self.constant(f"{name}/bias", bias), name=name)

  def layer_norm(self, name: str, x: str, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> str:
    """Returns x normalized over its last dimension."""
    constants = self.constant(f"{name}/scale", scale), self.constant(f"{name}/bias", bias)
    return self.apply("LayerNormalization", x, *constants, name=name, epsilon=epsilon)

  def model(self, name: str, producer: str) -> Any:
    """Returns the `onnx.ModelProto`, checked.

    Args:
      name: Name of the graph.
      producer: What made it, with its version.
    """
    helper = self._onnx.helper
    constants = [
      self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), key) for key, value in self._constants.items()
    ]
    graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, constants)
    model = helper.make_model(
      graph, producer_name=producer, ir_version=_IR_VERSION, opset_imports=[helper.make_opsetid("", _OPSET)]
    )
    self._onnx.checker.check_model(model, full_check=True)
    return model

  def _value(self, name: str, dtype: type, shape: tuple[str | int, ...]) -> Any:
    return self._onnx.helper.make_tensor_value_info(name, self._type(dtype), shape)

  def _type(self, dtype: type) -> int:
    """Returns the number that ONNX has for a type."""
    return int(self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
