"""The graph of a BERT encoder with pooling: `models.dual_encoder.DualEncoder.pool` of items that are padded, one a row.

Images are tokens of their items (early fusion), and may add a residual to the pooled output.
"""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import numpy as np

import vixml_jax
from vixml_jax.onnx_models.graph import Graph
from vixml_jax.typing import Tree

LAYERS = "layers"
"""Prefix of the names of the nodes that belong to the encoder's layers."""
INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
"""Inputs: token ids and their mask, int64 [batch, length], padded on the right."""
IMAGE_FEATURES, IMAGE_PLACES = "image_features", "image_places"
"""Inputs of a model with images: the features of the images of all items, float32 [images, F], and the row and the
position of each, int64 [images, 2]."""
POOLED, EMBEDDINGS = "pooled", "embeddings"
"""Outputs: the encoder's output for each item before and after it is scaled to unit norm, float32 [batch, D]."""

_MASKED = 1e30  # Subtracted from the scores of padding, whose probability is then exactly 0.
_SHORTEST = 1e-12  # Smaller norms and weights count as this.
_MIGRATION = 0.65  # alpha of SmoothQuant: 1 makes all dimensions of activations equally large, 0 those of weights.


class _Batch(NamedTuple):
  """Values that several parts of the graph need.

  Attributes:
    shape: Batch size and length, int64 [2].
    mask: 1 for tokens and 0 for padding, float32 [batch, length].
    scores: 0 for tokens and a very low number for padding, float32 [batch, 1, 1, length].
  """

  shape: str
  mask: str
  scores: str


class _Hidden(NamedTuple):
  """Hidden states of tokens, [batch * length, D], once for the products and once for the residual sum.

  Attributes:
    read: What the next products read: the hidden states divided by `scale`.
    kept: The hidden states.
    scale: Number by which each dimension of `read` was divided, float32 [D]; None if `read` is `kept`.
  """

  read: str
  kept: str
  scale: np.ndarray | None

  def kernel(self, kernel: np.ndarray) -> np.ndarray:
    """Returns the matrix [D, outputs] for `read` that gives the products of `kept` with a kernel [D, ...]."""
    matrix = kernel.reshape(len(kernel), -1)
    return matrix if self.scale is None else matrix * self.scale[:, None]


def bert_model(params: Tree, arguments: Mapping[str, Any], largest: Mapping[str, np.ndarray] | None = None) -> Any:
  """Returns an `onnx.ModelProto` that computes what `DualEncoder.pool` does for each item, up to rounding.

  Products of layers are nodes called `layers/LAYER/.../product`, with constant kernels. Tokens are one dimension there,
  and not two: otherwise ONNX Runtime would merge each sum with the norm that follows, into an operator that takes
  several times as long on CPUs (SkipLayerNormalization).

  Args:
    params: Parameters on the host: `encoder`, a `BertEncoder`, and optionally `fusion`, an `ImageFusion` with
      method="early".
    arguments: Arguments of `BertEncoder`.
    largest: Largest absolute value of each dimension of each norm's output, from `calibration.largest_outputs`. It
      prepares the model for quantization, at the cost of a few more nodes: what products read is scaled so that large
      values in few dimensions or in few tokens do not decide the range of all.

  Raises:
    InputError: onnx is not installed.

  Reference: SmoothQuant (arXiv 2211.10438), section 4, equation 4, for the scale of each dimension.
  """
  graph, encoder, fusion = Graph(), params["encoder"], params.get("fusion")
  layers = [_take(encoder["layers"], number) for number in range(arguments["num_layers"])]
  ids = graph.input(INPUT_IDS, np.int64, ("batch", "length"))
  mask = graph.as_float(graph.input(ATTENTION_MASK, np.int64, ("batch", "length")))
  x = graph.apply("Gather", graph.constant("word_embedding", encoder["word_embedding"]), ids)
  features = places = ""
  if fusion is not None:
    size = fusion["project"]["kernel"].shape[0]
    features = graph.input(IMAGE_FEATURES, np.float32, ("images", size))
    places = graph.input(IMAGE_PLACES, np.int64, ("images", 2))
    x = graph.apply("ScatterND", x, places, _adapted(graph, fusion, features))
  positions = encoder["position_embedding"]
  if "token_type_embedding" in encoder:
    positions = positions + encoder["token_type_embedding"][0]
  table, length = graph.constant("position_embedding", positions), graph.apply("Shape", ids, start=1, end=2)
  x = graph.apply("Add", x, graph.apply("Slice", table, graph.integers(0), length, graph.integers(0)))
  x = graph.apply("Reshape", x, graph.integers(-1, arguments["embed_dim"]))
  scores = graph.apply("Mul", graph.apply("Sub", mask, graph.number(1)), graph.number(_MASKED))
  batch = _Batch(graph.apply("Shape", ids), mask, graph.apply("Unsqueeze", scores, graph.integers(1, 2)))

  def norm(name: str, x: str, params: Tree, *readers: Tree) -> _Hidden:
    """Returns x normalized, as the linear maps `readers` read it next."""
    scale, bias, epsilon = params["scale"], params["bias"], arguments["layer_norm_eps"]
    if largest is None or not readers:
      normalized = graph.layer_norm(name, x, scale, bias, epsilon)
      return _Hidden(normalized, normalized, None)
    divisor = _balance(largest[name], [reader["kernel"] for reader in readers])
    read = graph.layer_norm(name, x, scale / divisor, bias / divisor, epsilon)
    return _Hidden(read, graph.apply("Mul", read, graph.constant(f"{name}/divisor", divisor)), divisor)

  hidden = norm("embedding_norm", x, encoder["embedding_norm"], *_projections(layers[0]))
  for number, (layer, following) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
    name = f"{LAYERS}/{number}"
    x = _attention(graph, f"{name}/attention", layer["attention"], hidden, batch, arguments["num_heads"])
    x = graph.apply("Add", hidden.kept, x)
    hidden = norm(f"{name}/attention_norm", x, layer["attention_norm"], layer["up"])
    wide = graph.linear(f"{name}/up", hidden.read, hidden.kernel(layer["up"]["kernel"]), layer["up"]["bias"])
    down = graph.linear if largest is None else graph.linear_by_row
    x = graph.apply("Add", hidden.kept, down(f"{name}/down", graph.apply("Gelu", wide), **layer["down"]))
    hidden = norm(f"{name}/mlp_norm", x, layer["mlp_norm"], *([] if following is None else _projections(following)))
  pooled = _pooled(graph, hidden.kept, batch, arguments["embed_dim"])
  if fusion is not None and "residual" in fusion:
    pooled = _with_residual(graph, fusion["residual"], pooled, features, places, batch)
  length = graph.apply("Max", graph.apply("ReduceL2", pooled, graph.integers(1), keepdims=1), graph.number(_SHORTEST))
  graph.output(EMBEDDINGS, graph.apply("Div", pooled, length), ("batch", arguments["embed_dim"]))
  graph.output(POOLED, pooled, ("batch", arguments["embed_dim"]))
  return graph.model("encoder", f"vixml_jax {vixml_jax.__version__}")


def _take(tree: Tree, layer: int) -> Tree:
  """Returns the parameters of one layer of a stack."""
  return {name: _take(leaf, layer) if isinstance(leaf, dict) else leaf[layer] for name, leaf in tree.items()}


def _projections(layer: Tree) -> list[Tree]:
  """Returns the linear maps that read the input of a layer."""
  return [layer["attention"][name] for name in ("query", "key", "value")]


def _balance(largest: np.ndarray, kernels: list[np.ndarray]) -> np.ndarray:
  """Returns the divisor of each dimension of a norm's output, float32 [D], with a geometric mean of 1.

  Args:
    largest: Largest absolute value of each dimension, [D].
    kernels: The kernels [D, ...] of the linear maps that read the output.
  """
  weights = np.max([np.abs(kernel.reshape(len(kernel), -1)).max(axis=1) for kernel in kernels], axis=0)
  largest, weights = np.maximum(largest, _SHORTEST), np.maximum(weights, _SHORTEST)
  logarithm = _MIGRATION * np.log(largest) - (1 - _MIGRATION) * np.log(weights)
  return np.exp(logarithm - logarithm.mean()).astype(np.float32)


def _attention(graph: Graph, name: str, params: Tree, x: _Hidden, batch: _Batch, num_heads: int) -> str:
  """Returns the output of an `Attention`, [batch * length, D]; padding is not attended to."""
  dim = params["query"]["kernel"].shape[0]
  head_dim = dim // num_heads
  split = graph.apply("Concat", batch.shape, graph.integers(num_heads, head_dim), axis=0)

  def heads(part: str, order: list[int], scale: float = 1.0) -> str:
    kernel, bias = (params[part][leaf] * np.float32(scale) for leaf in ("kernel", "bias"))
    projected = graph.linear(f"{name}/{part}", x.read, x.kernel(kernel), bias.reshape(dim))
    return graph.apply("Transpose", graph.apply("Reshape", projected, split), perm=order)

  query, key = heads("query", [0, 2, 1, 3], 1 / math.sqrt(head_dim)), heads("key", [0, 2, 3, 1])
  scores = graph.apply("Add", graph.apply("MatMul", query, key), batch.scores)
  mixed = graph.apply("MatMul", graph.apply("Softmax", scores, axis=-1), heads("value", [0, 2, 1, 3]))
  joined = graph.apply("Reshape", graph.apply("Transpose", mixed, perm=[0, 2, 1, 3]), graph.integers(-1, dim))
  output = params["output"]
  return graph.linear(f"{name}/output", joined, output["kernel"].reshape(dim, dim), output["bias"])


def _pooled(graph: Graph, hidden: str, batch: _Batch, dim: int) -> str:
  """Returns the mean of each item's tokens, [batch, D]; zero for an item without tokens."""
  hidden = graph.apply("Reshape", hidden, graph.apply("Concat", batch.shape, graph.integers(dim), axis=0))
  summed = graph.apply("MatMul", graph.apply("Unsqueeze", batch.mask, graph.integers(1)), hidden)
  count = graph.apply("ReduceSum", batch.mask, graph.integers(1), keepdims=1)
  return graph.apply(
    "Div", graph.apply("Squeeze", summed, graph.integers(1)), graph.apply("Max", count, graph.number(1))
  )


def _adapted(graph: Graph, fusion: Tree, features: str) -> str:
  """Returns image features at the encoder's width, as `ImageFusion.adapt`."""
  x = graph.linear("fusion/project", features, **fusion["project"])
  if "hidden" in fusion:
    x = graph.linear("fusion/hidden", graph.apply("Gelu", x), **fusion["hidden"])
  if "gate" in fusion:
    gate = graph.apply("Sigmoid", graph.linear("fusion/gate", features, **fusion["gate"]))
    x = graph.apply("Mul", x, gate)
  return x


def _with_residual(graph: Graph, params: Tree, pooled: str, features: str, places: str, batch: _Batch) -> str:
  """Returns the pooled outputs plus a linear map of each item's mean features, as `ImageFusion.add_residual`."""
  size = params["kernel"].shape[0]
  rows = graph.apply("Slice", places, graph.integers(0), graph.integers(1), graph.integers(1))
  count = graph.apply("Shape", places, start=0, end=1)

  def by_item(values: str, width: int) -> str:
    """Returns the sum of the values [images, width] of each item, [batch, width]."""
    shape = graph.apply("Concat", graph.apply("Shape", batch.mask, start=0, end=1), graph.integers(width), axis=0)
    return graph.apply("ScatterND", graph.apply("Expand", graph.number(0), shape), rows, values, reduction="add")

  ones = graph.apply("Expand", graph.number(1), graph.apply("Concat", count, graph.integers(1), axis=0))
  number = by_item(ones, 1)
  mean = graph.apply("Div", by_item(features, size), graph.apply("Max", number, graph.number(1)))
  scale = np.float32(1 / math.sqrt(size))
  added = graph.linear("fusion/residual", mean, params["kernel"] * scale, params["bias"] * scale)
  return graph.apply("Add", pooled, graph.apply("Mul", added, graph.apply("Min", number, graph.number(1))))
