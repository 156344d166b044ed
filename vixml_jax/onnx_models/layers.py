"""Parts of graphs that encoders share: attention, norms, the mean over the tokens of an item."""

import math
from typing import NamedTuple

import numpy as np

from vixml_jax.onnx_models.graph import Graph
from vixml_jax.typing import Tree

SHORTEST = 1e-12
"""Smaller norms and weights count as this."""

_MASKED = 1e30  # Subtracted from the scores of padding, whose probability is then exactly 0.


class TokenBatch(NamedTuple):
  """What several parts of a graph need to know of a batch of padded items.

  Attributes:
    shape: Batch size and length, int64 [2].
    mask: 1 for tokens and 0 for padding, float32 [batch, length].
    scores: 0 for tokens and a very low number for padding, float32 [batch, 1, 1, length].
  """

  shape: str
  mask: str
  scores: str

  @classmethod
  def of_mask(cls, graph: Graph, mask: str) -> "TokenBatch":
    """Returns the values for a mask, float32 [batch, length]."""
    scores = graph.apply("Mul", graph.apply("Sub", mask, graph.number(1)), graph.number(_MASKED))
    return cls(graph.apply("Shape", mask), mask, graph.apply("Unsqueeze", scores, graph.integers(1, 2)))


class Hidden(NamedTuple):
  """Hidden states of tokens, [batch * length, D], once for the products and once for the residual sum.

  Attributes:
    read: What the next products read: the hidden states divided by `scale`.
    kept: The hidden states.
    scale: Number by which each dimension of `read` was divided, float32 [D]; None if `read` is `kept`.
  """

  read: str
  kept: str
  scale: np.ndarray | None = None

  def kernel(self, kernel: np.ndarray) -> np.ndarray:
    """Returns the matrix [D, outputs] for `read` that gives the products of `kept` with a kernel [D, ...]."""
    matrix = kernel.reshape(len(kernel), -1)
    return matrix if self.scale is None else matrix * self.scale[:, None]


def take_layer(tree: Tree, layer: int) -> Tree:
  """Returns the parameters of one layer of a stack."""
  return {name: take_layer(leaf, layer) if isinstance(leaf, dict) else leaf[layer] for name, leaf in tree.items()}


def layer_norm(graph: Graph, name: str, x: str, params: Tree, epsilon: float) -> str:
  """Returns x normalized over its last dimension, as `models.layers.LayerNorm`."""
  return graph.layer_norm(name, x, params["scale"], params["bias"], epsilon)


def attention(
  graph: Graph,
  name: str,
  params: Tree,
  x: Hidden,
  shape: str,
  num_heads: int,
  *,
  scores: str = "",
  probe: np.ndarray | None = None,
) -> str:
  """Returns the output of a `models.attention.Attention`, [batch * length, D].

  Args:
    graph: The graph.
    name: Beginning of the names of its nodes.
    params: Parameters of the attention.
    x: Vectors that are attended to.
    shape: Batch size and length, int64 [2].
    num_heads: Number of heads.
    scores: Added to the scores, float32 [batch, 1, 1, length]; "" for nothing.
    probe: The only vector that attends, float32 [D]; None if all of x do. The output is then [batch, D].
  """
  dim = params["query"]["kernel"].shape[0]
  head_dim = dim // num_heads
  split = graph.apply("Concat", shape, graph.integers(num_heads, head_dim), axis=0)

  def weights(part: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    kernel, bias = (params[part][leaf] * np.float32(scale) for leaf in ("kernel", "bias"))
    return kernel, bias.reshape(dim)

  def heads(part: str, order: list[int], scale: float = 1.0) -> str:
    kernel, bias = weights(part, scale)
    projected = graph.linear(f"{name}/{part}", x.read, x.kernel(kernel), bias)
    return graph.apply("Transpose", graph.apply("Reshape", projected, split), perm=order)

  if probe is None:
    query = heads("query", [0, 2, 1, 3], 1 / math.sqrt(head_dim))
  else:
    kernel, bias = weights("query", 1 / math.sqrt(head_dim))
    projected = probe @ kernel.reshape(dim, dim) + bias
    query = graph.constant(f"{name}/query", projected.reshape(1, num_heads, 1, head_dim))
  found = graph.apply("MatMul", query, heads("key", [0, 2, 3, 1]))
  if scores:
    found = graph.apply("Add", found, scores)
  mixed = graph.apply("MatMul", graph.apply("Softmax", found, axis=-1), heads("value", [0, 2, 1, 3]))
  joined = graph.apply("Reshape", graph.apply("Transpose", mixed, perm=[0, 2, 1, 3]), graph.integers(-1, dim))
  output = params["output"]
  return graph.linear(f"{name}/output", joined, output["kernel"].reshape(dim, dim), output["bias"])


def mean_of_tokens(graph: Graph, hidden: str, batch: TokenBatch, dim: int) -> str:
  """Returns the mean of each item's tokens, [batch, D]; zero for an item without tokens."""
  hidden = graph.apply("Reshape", hidden, graph.apply("Concat", batch.shape, graph.integers(dim), axis=0))
  summed = graph.apply("MatMul", graph.apply("Unsqueeze", batch.mask, graph.integers(1)), hidden)
  count = graph.apply("ReduceSum", batch.mask, graph.integers(1), keepdims=1)
  return graph.apply(
    "Div", graph.apply("Squeeze", summed, graph.integers(1)), graph.apply("Max", count, graph.number(1))
  )
