"""Graphs of what `models.fusion.ImageFusion` computes: images as tokens of their items, or mixed with pooled texts."""

import math

import numpy as np

from vixml_jax.onnx_models.graph import Graph
from vixml_jax.onnx_models.layers import Hidden, TokenBatch, attention, layer_norm, mean_of_tokens
from vixml_jax.typing import Tree

IMAGE_FEATURES, IMAGE_PLACES = "image_features", "image_places"
"""Inputs of a model with images: the features of the images of all items, float32 [images, F], and the item of each
and its place there, int64 [images, 2]. With early fusion a place is a position among the tokens of the item. With late
fusion, places count the images of an item from 0."""


class ImageInputs:
  """The images of a batch in a graph, and what the parameters of an `ImageFusion` make of them.

  Args:
    graph: The graph, to which the two inputs are added.
    params: Parameters of the `ImageFusion`.
  """

  def __init__(self, graph: Graph, params: Tree):
    self._graph, self._params = graph, params
    self._size: int = params["project"]["kernel"].shape[0]
    self._features = graph.input(IMAGE_FEATURES, np.float32, ("images", self._size))
    self._places = graph.input(IMAGE_PLACES, np.int64, ("images", 2))

  @property
  def are_tokens(self) -> bool:
    """Whether images are tokens of their items (early fusion)."""
    return "mixer" not in self._params

  def place(self, x: str, mask: str, num_heads: int) -> str:
    """Returns the word vectors [batch, length, D] with the images in their places, as `ImageFusion.place`.

    Args:
      x: Word vectors, [batch, length, D].
      mask: 1 for tokens, images included, and 0 for padding, float32 [batch, length].
      num_heads: Number of heads of cross-attention.
    """
    tokens = self._adapted()
    if "attention" in self._params:
      tokens = self._graph.apply("Add", tokens, self._attended(tokens, x, mask, num_heads))
    return self._graph.apply("ScatterND", x, self._places, tokens)

  def add_to(self, pooled: str, batch: TokenBatch) -> str:
    """Returns the pooled outputs [batch, D] with the residual of early fusion, as `ImageFusion.add_residual`."""
    if "residual" not in self._params:
      return pooled
    graph, params = self._graph, self._params["residual"]
    rows = self._column(0)
    items = graph.apply("Shape", batch.mask, start=0, end=1)

    def by_item(values: str, width: int) -> str:
      """Returns the sum of the values [images, width] of each item, [batch, width]."""
      return graph.apply("ScatterND", self._filled(0, items, width), rows, values, reduction="add")

    number = by_item(self._filled(1, self._count(), 1), 1)
    mean = graph.apply("Div", by_item(self._features, self._size), graph.apply("Max", number, graph.number(1)))
    scale = np.float32(1 / math.sqrt(self._size))
    added = graph.linear("fusion/residual", mean, params["kernel"] * scale, params["bias"] * scale)
    return graph.apply("Add", pooled, graph.apply("Mul", added, graph.apply("Min", number, graph.number(1))))

  def mix(self, pooled: str, dim: int, num_heads: int, epsilon: float) -> str:
    """Returns the pooled outputs of late fusion, [batch, D], as `ImageFusion.mix`.

    Args:
      pooled: Pooled texts, [batch, D].
      dim: D.
      num_heads: Number of attention heads of the layer.
      epsilon: Added to the variance in its norms.
    """
    graph, params = self._graph, self._params["mixer"]
    used = graph.apply("Add", graph.apply("Reshape", self._column(1), graph.integers(-1)), graph.integers(1))
    width = graph.apply("ReduceMax", graph.apply("Concat", graph.integers(0), used, axis=0), keepdims=1)
    items = graph.apply("Shape", pooled, start=0, end=1)
    grid = graph.apply("Concat", items, width, axis=0)
    images = graph.apply("ScatterND", self._filled(0, grid, dim), self._places, self._adapted())
    x = graph.apply("Concat", graph.apply("Unsqueeze", pooled, graph.integers(1)), images, axis=1)
    present = graph.apply("ScatterND", self._filled(0, grid), self._places, self._filled(1, self._count()))
    batch = TokenBatch.of_mask(graph, graph.apply("Concat", self._filled(1, items, 1), present, axis=1))
    x = graph.apply("Reshape", x, graph.integers(-1, dim))
    mixed = attention(
      graph, "fusion/attention", params["attention"], Hidden(x, x), batch.shape, num_heads, scores=batch.scores
    )
    x = graph.apply("Add", x, mixed)
    x = layer_norm(graph, "fusion/attention_norm", x, params["attention_norm"], epsilon)
    wide = graph.apply("Gelu", graph.linear("fusion/up", x, **params["up"]))
    x = graph.apply("Add", x, graph.linear("fusion/down", wide, **params["down"]))
    return mean_of_tokens(graph, layer_norm(graph, "fusion/mlp_norm", x, params["mlp_norm"], epsilon), batch, dim)

  def _adapted(self) -> str:
    """Returns the features at the encoder's width, [images, D], as `ImageFusion.adapt`."""
    graph, params = self._graph, self._params
    x = graph.linear("fusion/project", self._features, **params["project"])
    if "hidden" in params:
      x = graph.linear("fusion/hidden", graph.apply("Gelu", x), **params["hidden"])
    if "gate" in params:
      x = graph.apply("Mul", x, graph.apply("Sigmoid", graph.linear("fusion/gate", self._features, **params["gate"])))
    return x

  def _attended(self, tokens: str, x: str, mask: str, num_heads: int) -> str:
    """Returns the attention of images [images, D] to the words of their items, [images, D], as `Attention.cross`."""
    graph, params = self._graph, self._params["attention"]
    dim = params["query"]["kernel"].shape[0]
    head_dim = dim // num_heads
    items = graph.apply("Reshape", self._column(0), graph.integers(-1))

    def heads(part: str, values: str, order: list[int], scale: float = 1.0) -> str:
      """Returns a projection of values, [batch or images, length or 1, D], divided into heads."""
      kernel, bias = (params[part][leaf] * np.float32(scale) for leaf in ("kernel", "bias"))
      projected = graph.linear(f"fusion/cross/{part}", values, kernel.reshape(dim, dim), bias.reshape(dim))
      shape = graph.apply("Shape", values, start=0, end=2)
      shape = graph.apply("Concat", shape, graph.integers(num_heads, head_dim), axis=0)
      return graph.apply("Transpose", graph.apply("Reshape", projected, shape), perm=order)

    query = heads("query", graph.apply("Unsqueeze", tokens, graph.integers(1)), [0, 2, 1, 3], 1 / math.sqrt(head_dim))
    key, value = (
      graph.apply("Gather", heads(part, x, order), items)
      for part, order in (("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
    )
    # An image attends to no image.
    words = graph.apply("ScatterND", mask, self._places, self._filled(0, self._count()))
    batch = TokenBatch.of_mask(graph, graph.apply("Gather", words, items))
    scores = graph.apply("Add", graph.apply("MatMul", query, key), batch.scores)
    mixed = graph.apply("MatMul", graph.apply("Softmax", scores, axis=-1), value)
    output = params["output"]
    attended = graph.linear(
      "fusion/cross/output",
      graph.apply("Reshape", mixed, graph.integers(-1, dim)),
      output["kernel"].reshape(dim, dim),
      output["bias"],
    )
    count = graph.apply("ReduceSum", batch.mask, graph.integers(1), keepdims=1)
    return graph.apply("Mul", attended, graph.apply("Min", count, graph.number(1)))

  def _column(self, column: int) -> str:
    """Returns the items (0) of the images or their places there (1), int64 [images, 1]."""
    graph = self._graph
    return graph.apply("Slice", self._places, *(graph.integers(number) for number in (column, column + 1, 1)))

  def _count(self) -> str:
    """Returns the number of images, int64 [1]."""
    return self._graph.apply("Shape", self._places, start=0, end=1)

  def _filled(self, value: float, shape: str, *more: int) -> str:
    """Returns an array of one number, float32; its shape is a value of the graph, followed by given sizes."""
    graph = self._graph
    shape = graph.apply("Concat", shape, graph.integers(*more), axis=0) if more else shape
    return graph.apply("Expand", graph.number(value), shape)
