"""The graph of a SigLIP tower, `models.vision.VisionTransformer`: pixels to one feature vector for each image."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import vixml_jax
from vixml_jax.onnx_models.graph import Graph
from vixml_jax.onnx_models.layers import Hidden, attention, layer_norm, take_layer
from vixml_jax.typing import Tree

PIXELS = "pixels"
"""Input: images that have the size of the tower, red, green and blue, uint8 [images, size, size, 3]."""
FEATURES = "features"
"""Output: what `images.tower` stores of them, float32 [images, F] with the precision of float16."""


def siglip_model(params: Tree, arguments: Mapping[str, Any]) -> Any:
  """Returns an `onnx.ModelProto` that computes what `VisionTransformer` does in float32, up to rounding.

  Args:
    params: Parameters on the host.
    arguments: Arguments of `VisionTransformer`.

  Raises:
    InputError: onnx is not installed.
  """
  graph, size, patch = Graph(), arguments["image_size"], arguments["patch_size"]
  dim, heads, epsilon = arguments["embed_dim"], arguments["num_heads"], arguments.get("layer_norm_eps", 1e-6)
  grid = size // patch
  x = graph.as_float(graph.input(PIXELS, np.uint8, ("images", size, size, 3)))
  x = graph.apply("Sub", graph.apply("Mul", x, graph.number(2 / 255)), graph.number(1))
  whole = graph.integers(grid * patch, grid * patch)
  x = graph.apply("Slice", x, graph.integers(0, 0), whole, graph.integers(1, 2))
  x = graph.apply("Reshape", x, graph.integers(-1, grid, patch, grid, patch, 3))
  x = graph.apply("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
  x = graph.apply("Reshape", x, graph.integers(-1, grid**2, patch * patch * 3))
  embedding = params["patch_embedding"]
  x = graph.linear("patch_embedding", x, embedding["kernel"].reshape(-1, dim), embedding["bias"])
  x = graph.apply("Add", x, graph.constant("position_embedding", params["position_embedding"]))
  shape = graph.apply("Shape", x, start=0, end=2)
  x = graph.apply("Reshape", x, graph.integers(-1, dim))

  def feed_forward(name: str, block: Tree, x: str) -> str:
    """Returns x + MLP(LN(x))."""
    normalized = layer_norm(graph, f"{name}/mlp_norm", x, block["mlp_norm"], epsilon)
    wide = graph.apply("Gelu", graph.linear(f"{name}/up", normalized, **block["up"]), approximate="tanh")
    return graph.apply("Add", x, graph.linear(f"{name}/down", wide, **block["down"]))

  for number in range(arguments["num_layers"]):
    name, layer = f"layers/{number}", take_layer(params["layers"], number)
    normalized = layer_norm(graph, f"{name}/attention_norm", x, layer["attention_norm"], epsilon)
    read = Hidden(normalized, normalized)
    x = graph.apply("Add", x, attention(graph, f"{name}/attention", layer["attention"], read, shape, heads))
    x = feed_forward(name, layer, x)
  x = layer_norm(graph, "final_norm", x, params["final_norm"], epsilon)
  head = params["head"]
  pooled = attention(graph, "head/attention", head["attention"], Hidden(x, x), shape, heads, probe=head["probe"])
  features = feed_forward("head", head, pooled)
  graph.output(FEATURES, graph.as_float(graph.cast(features, np.float16)), ("images", dim))
  return graph.model("image_tower", f"vixml_jax {vixml_jax.__version__}")
