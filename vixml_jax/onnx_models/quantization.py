"""Rounds the matrices of an encoder's layers to int8, with ONNX Runtime's dynamic quantization."""

from collections.abc import Iterator
import contextlib
import logging
from pathlib import Path
import tempfile
from typing import Any

from vixml_jax.onnx_models.bert import LAYERS
from vixml_jax.onnx_models.libraries import import_library


def quantized(model: Any) -> bytes:
  """Returns a serialized model whose layers compute products of int8 matrices and uint8 activations.

  A matrix has a scale for each output. Its values have 7 bits (`reduce_range`): CPUs without VNNI add two products of
  8 bits into 16, which could overflow. Activations are scaled by the range that those of a batch have, so that the
  result for an item depends slightly on the others of its batch. Everything but the products of layers stays float32:
  embeddings, norms, attention, pooling and images.

  Args:
    model: `onnx.ModelProto` from `bert_model`, balanced for quantization. It is not changed.

  Raises:
    InputError: onnxruntime is not installed.
  """
  quantization = import_library("onnxruntime.quantization")
  names = [node.name for node in model.graph.node]
  products = [name for name in names if name.startswith(f"{LAYERS}/") and name.endswith("/product")]
  with tempfile.TemporaryDirectory() as folder, _errors_only():
    path = Path(folder) / "model.onnx"
    quantization.quantize_dynamic(
      model,
      path,
      per_channel=True,
      reduce_range=True,
      weight_type=quantization.QuantType.QInt8,
      nodes_to_quantize=products,
    )
    return path.read_bytes()


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
  """Silences the quantizer, which logs every activation without a fixed range, and advises to optimize the model."""
  root = logging.getLogger()
  level = root.level
  root.setLevel(logging.ERROR)
  try:
    yield
  finally:
    root.setLevel(level)
