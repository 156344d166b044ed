"""A model without values: the start of abstract initialization, restoring and compilation."""

import dataclasses
import math
from typing import Any

from flax import nnx
import jax

from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.lora import split_lora
from vixml_jax.models.parameters import merge_params, split_params
from vixml_jax.typing import Tree


@dataclasses.dataclass(frozen=True, repr=False)
class ModelDefinition:
  """A `DualEncoder` without values.

  Attributes:
    arguments: Arguments of `define_model`, by name.
    graphdef: Structure of the module, for `parameters.merge_params`.
    shapes: Nested dict with a `jax.ShapeDtypeStruct` for each parameter.
    axes: Nested dict with the same keys and a tuple of logical axes for each parameter.
  """

  arguments: dict[str, Any]
  graphdef: nnx.GraphDef[Any]
  shapes: Tree
  axes: Tree

  def __repr__(self) -> str:
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))
    return (
      f"ModelDefinition({self.arguments['architecture']}, method={self.arguments['method']!r}, parameters={count:,})"
    )

  def bind(self, params: Tree) -> DualEncoder:
    """Returns the module with these parameters; can be called under jit."""
    return merge_params(self.graphdef, params)

  def split_base(self, tree: Tree) -> tuple[Tree, Tree]:
    """Splits a tree with the parameters' keys into `(rest, base)`.

    `base` is the encoder without adapters, which pretrained weights fill. `rest` is everything else.
    `parameters.join_params` is the inverse.
    """
    base, adapters = split_lora(tree["encoder"])
    rest = {name: value for name, value in tree.items() if name != "encoder"}
    return rest | ({"encoder": adapters} if adapters else {}), {"encoder": base}

  def split(self, tree: Tree) -> tuple[Tree, Tree]:
    """Splits a tree with the parameters' keys into `(trained, frozen)`.

    `frozen` is empty if the encoder has no adapters. `parameters.join_params` is the inverse.
    """
    return self.split_base(tree) if self.freezes_encoder else (tree, {})

  @property
  def freezes_encoder(self) -> bool:
    """Whether the encoder is frozen and its adapters are trained instead."""
    return bool(self.arguments["encoder"].get("lora_rank"))

  @property
  def has_free_vectors(self) -> bool:
    """Whether labels have free vectors, which they share with the other labels of a cluster."""
    return "free_vectors" in self.shapes

  @property
  def has_centroids(self) -> bool:
    """Whether the prototype of a label depends on its centroid."""
    return self.arguments["method"] in ("prime", "mean")

  @property
  def embed_dim(self) -> int:
    """Width of the embeddings, D."""
    return self.arguments["encoder"]["embed_dim"]


def define_model(
  encoder: dict[str, Any],
  prototype: dict[str, Any],
  num_free_vectors: int,
  fusion: dict[str, Any] | None = None,
  architecture: str = "bert",
  pooling: str = "mean",
  method: str = "prime",
) -> ModelDefinition:
  """Returns the definition of the `DualEncoder` with these arguments, without computing any value."""
  arguments: dict[str, Any] = {
    "encoder": dict(encoder),
    "prototype": dict(prototype),
    "num_free_vectors": num_free_vectors,
    "fusion": fusion,
    "architecture": architecture,
    "pooling": pooling,
    "method": method,
  }
  abstract = nnx.eval_shape(lambda: DualEncoder(**arguments, rngs=nnx.Rngs(0)))
  return ModelDefinition(arguments, *split_params(abstract))
