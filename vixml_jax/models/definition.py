"""A model without values: what abstract initialisation, restoring and compiling start from."""

import dataclasses
from typing import Any

from flax import nnx

from vixml_jax.models import layers
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.typing import Tree


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
  """A model without values: how to build it, and the shapes and logical axes of its parameters."""

  arguments: dict[str, Any]
  graphdef: Any
  shapes: Tree
  axes: Tree

  def bind(self, params: Tree) -> DualEncoder:
    """The module with these parameters; usable under jit."""
    return layers.merge_params(self.graphdef, params)

  @property
  def embed_dim(self) -> int:
    """D."""
    return self.arguments["encoder"]["embed_dim"]


def define_model(
    encoder: dict, prototype: dict, num_free_vectors: int, fusion: dict | None = None) -> ModelDefinition:
  """Shapes and axes of a `DualEncoder`, computing nothing."""
  arguments: dict[str, Any] = {
      "encoder": dict(encoder), "prototype": dict(prototype), "num_free_vectors": num_free_vectors,
      "fusion": fusion}
  abstract = nnx.eval_shape(lambda: DualEncoder(**arguments, rngs=nnx.Rngs(0)))
  return ModelDefinition(arguments, *layers.split_params(abstract))
