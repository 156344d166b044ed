"""The graph of a BERT encoder with pooling: `models.dual_encoder.DualEncoder.pool` of items that are padded, one a row.

Items may have images, which early or late fusion combines with the texts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

import vixml_jax
from vixml_jax.onnx_models.graph import Graph
from vixml_jax.onnx_models.image_fusion import ImageInputs
from vixml_jax.onnx_models.layers import SHORTEST, Hidden, TokenBatch, attention, mean_of_tokens, take_layer
from vixml_jax.typing import Tree

LAYERS = "layers"
"""Prefix of the names of the nodes that belong to the encoder's layers."""
INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
"""Inputs: token ids and their mask, int64 [batch, length], padded on the right."""
POOLED, EMBEDDINGS = "pooled", "embeddings"
"""Outputs: the encoder's output for each item before and after it is scaled to unit norm, float32 [batch, D]."""

_MIGRATION = 0.65  # alpha of SmoothQuant: 1 makes all dimensions of activations equally large, 0 those of weights.


def bert_model(params: Tree, arguments: Mapping[str, Any], largest: Mapping[str, np.ndarray] | None = None) -> Any:
  """Returns an `onnx.ModelProto` that computes what `DualEncoder.pool` does for each item, up to rounding.

  Products of layers are nodes called `layers/LAYER/.../product`, with constant kernels. Tokens are one dimension there,
  and not two: otherwise ONNX Runtime would merge each sum with the norm that follows, into an operator that takes
  several times as long on CPUs (SkipLayerNormalization).

  Args:
    params: Parameters on the host: `encoder`, a `BertEncoder`, and optionally `fusion`, an `ImageFusion`.
    arguments: Arguments of `BertEncoder`. Its heads and `layer_norm_eps` are those of the fusion, too.
    largest: Largest absolute value of each dimension of each norm's output, from `calibration.largest_outputs`. It
      prepares the model for quantization, at the cost of a few more nodes: what products read is scaled so that large
      values in few dimensions or in few tokens do not decide the range of all.

  Raises:
    InputError: onnx is not installed.

  Reference: SmoothQuant (arXiv 2211.10438), section 4, equation 4, for the scale of each dimension.
  """
  graph, encoder = Graph(), params["encoder"]
  layers = [take_layer(encoder["layers"], number) for number in range(arguments["num_layers"])]
  ids = graph.input(INPUT_IDS, np.int64, ("batch", "length"))
  mask = graph.as_float(graph.input(ATTENTION_MASK, np.int64, ("batch", "length")))
  x = graph.apply("Gather", graph.constant("word_embedding", encoder["word_embedding"]), ids)
  images = ImageInputs(graph, params["fusion"]) if "fusion" in params else None
  if images is not None and images.are_tokens:
    x = images.place(x, mask, arguments["num_heads"])
  positions = encoder["position_embedding"]
  if "token_type_embedding" in encoder:
    positions = positions + encoder["token_type_embedding"][0]
  table, length = graph.constant("position_embedding", positions), graph.apply("Shape", ids, start=1, end=2)
  x = graph.apply("Add", x, graph.apply("Slice", table, graph.integers(0), length, graph.integers(0)))
  x = graph.apply("Reshape", x, graph.integers(-1, arguments["embed_dim"]))
  batch = TokenBatch.of_mask(graph, mask)

  def norm(name: str, x: str, params: Tree, *readers: Tree) -> Hidden:
    """Returns x normalized, as the linear maps `readers` read it next."""
    scale, bias, epsilon = params["scale"], params["bias"], arguments["layer_norm_eps"]
    if largest is None or not readers:
      normalized = graph.layer_norm(name, x, scale, bias, epsilon)
      return Hidden(normalized, normalized)
    divisor = _balance(largest[name], [reader["kernel"] for reader in readers])
    read = graph.layer_norm(name, x, scale / divisor, bias / divisor, epsilon)
    return Hidden(read, graph.apply("Mul", read, graph.constant(f"{name}/divisor", divisor)), divisor)

  hidden = norm("embedding_norm", x, encoder["embedding_norm"], *_projections(layers[0]))
  for number, (layer, following) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
    name = f"{LAYERS}/{number}"
    x = attention(
      graph, f"{name}/attention", layer["attention"], hidden, batch.shape, arguments["num_heads"], scores=batch.scores
    )
    x = graph.apply("Add", hidden.kept, x)
    hidden = norm(f"{name}/attention_norm", x, layer["attention_norm"], layer["up"])
    wide = graph.linear(f"{name}/up", hidden.read, hidden.kernel(layer["up"]["kernel"]), layer["up"]["bias"])
    down = graph.linear if largest is None else graph.linear_by_row
    x = graph.apply("Add", hidden.kept, down(f"{name}/down", graph.apply("Gelu", wide), **layer["down"]))
    hidden = norm(f"{name}/mlp_norm", x, layer["mlp_norm"], *([] if following is None else _projections(following)))
  pooled = mean_of_tokens(graph, hidden.kept, batch, arguments["embed_dim"])
  if images is not None and images.are_tokens:
    pooled = images.add_to(pooled, batch)
  elif images is not None:
    pooled = images.mix(pooled, arguments["embed_dim"], arguments["num_heads"], arguments["layer_norm_eps"])
  length = graph.apply("Max", graph.apply("ReduceL2", pooled, graph.integers(1), keepdims=1), graph.number(SHORTEST))
  graph.output(EMBEDDINGS, graph.apply("Div", pooled, length), ("batch", arguments["embed_dim"]))
  graph.output(POOLED, pooled, ("batch", arguments["embed_dim"]))
  return graph.model("encoder", f"vixml_jax {vixml_jax.__version__}")


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
  largest, weights = np.maximum(largest, SHORTEST), np.maximum(weights, SHORTEST)
  logarithm = _MIGRATION * np.log(largest) - (1 - _MIGRATION) * np.log(weights)
  return np.exp(logarithm - logarithm.mean()).astype(np.float32)
