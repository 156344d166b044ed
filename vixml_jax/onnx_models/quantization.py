"""Rounds the matrices of an encoder's layers to int8, with ONNX Runtime's dynamic quantization."""

from collections.abc import Iterator, Mapping
import contextlib
import logging
from pathlib import Path
import platform
import tempfile
from typing import Any

from vixml_jax.input.packing import WholeItems
from vixml_jax.onnx_models.bert import LAYERS, bert_model
from vixml_jax.onnx_models.calibration import largest_outputs
from vixml_jax.onnx_models.libraries import import_library
from vixml_jax.typing import Tree


def weight_bits() -> int:
  """Returns the number of bits that the weights may have on this CPU: 7 on x86 without VNNI, else 8.

  Such a CPU adds two products of 8 bits into 16, which may overflow (`reduce_range` of ONNX Runtime).
  """
  if platform.machine() not in ("x86_64", "AMD64"):
    return 8
  try:
    return 8 if "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else 7
  except OSError:
    return 7


def int8_model(params: Tree, arguments: Mapping[str, Any], examples: WholeItems) -> bytes:
  """Returns a serialized model whose layers compute products of int8 weights and uint8 activations.

  A matrix has a scale for each output, and `weight_bits()`. Activations are scaled by the range that those of a batch
  have, so that the result for an item depends slightly on the others of its batch. Everything but the products of
  layers stays float32: embeddings, norms, attention, pooling and images.

  Args:
    params: As for `bert_model`.
    arguments: As for `bert_model`.
    examples: Items of texts only, such as `calibration.random_items`, which show how large activations are.

  Raises:
    InputError: onnx or onnxruntime is not installed.
  """
  quantization = import_library("onnxruntime.quantization")
  largest = largest_outputs(bert_model({"encoder": params["encoder"]}, arguments), examples)
  model = bert_model(params, arguments, largest)
  names = [node.name for node in model.graph.node]
  products = [name for name in names if name.startswith(f"{LAYERS}/") and name.endswith("/product")]
  with tempfile.TemporaryDirectory() as folder, _errors_only():
    path = Path(folder) / "model.onnx"
    quantization.quantize_dynamic(
      model,
      path,
      per_channel=True,
      reduce_range=weight_bits() < 8,
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
