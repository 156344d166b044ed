"""Finds how large the activations of an encoder become, on random tokens: quantization balances them with the weights.

Large activations are a property of the weights, in the same few dimensions for all texts. Random tokens show them as
well as real texts do (docs/performance.md).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, WholeItems, whole_items
from vixml_jax.onnx_models.libraries import import_library
from vixml_jax.onnx_models.session import inputs_of, new_session
from vixml_jax.ragged import Ragged

_NUM_ITEMS = 256
_MOST_TOKENS = 16  # Random tokens of an item.
_ITEMS_AT_ONCE = 32


def random_items(vocab_size: int, special: Sequence[int], max_length: int, layout: PackedLayout) -> WholeItems:
  """Returns items of random tokens, always the same ones.

  Args:
    vocab_size: Number of token ids.
    special: Tokens of an empty text; the first one begins a text, and the others end it.
    max_length: Maximum number of tokens of a text, special ones included.
    layout: Parts of an item.
  """
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, min(_MOST_TOKENS, max_length - len(special)) + 1, _NUM_ITEMS)
  rows = [[*special[:1], *rng.integers(0, vocab_size, length), *special[1:]] for length in lengths]
  return whole_items(Items.of_texts(Ragged.from_rows(rows)), layout)


def largest_outputs(model: Any, items: WholeItems) -> dict[str, np.ndarray]:
  """Returns the largest absolute value of each dimension of the output of each norm, float32 [D].

  Args:
    model: `onnx.ModelProto` from `bert_model`, of texts only.
    items: Items of texts only.

  Raises:
    InputError: onnx or onnxruntime is not installed.
  """
  onnx = import_library("onnx")
  names = [node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization"]
  extended = onnx.ModelProto()
  extended.CopyFrom(model)
  extended.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
  session = new_session(extended.SerializeToString())
  largest: dict[str, np.ndarray] = {}
  order = np.argsort(items.tokens.lengths, kind="stable")  # With little padding, whose outputs count as well.
  for start in range(0, len(order), _ITEMS_AT_ONCE):
    found = session.run(names, inputs_of(items, order[start : start + _ITEMS_AT_ONCE]))
    for name, values in zip(names, found, strict=True):
      largest[name] = np.maximum(np.abs(values).max(axis=0), largest.get(name, np.float32(0)))
  return largest
