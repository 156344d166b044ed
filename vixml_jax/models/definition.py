"""A model without values: what abstract initialization, restoring and compiling start from."""

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

  def split_base(self, tree: Tree) -> tuple[Tree, Tree]:
    """Takes a tree with the parameters' keys apart: all else, and the encoder without adapters.

    The second part is what pretrained weights fill. `layers.join_params` puts both together.
    """
    base, adapters = layers.split_lora(tree["encoder"])
    rest = {name: value for name, value in tree.items() if name != "encoder"}
    return rest | ({"encoder": adapters} if adapters else {}), {"encoder": base}

  def split(self, tree: Tree) -> tuple[Tree, Tree]:
    """Takes a tree with the parameters' keys apart: what is trained, and what is frozen.

    The second part is empty where the encoder has no adapters.
    """
    return self.split_base(tree) if self.freezes_encoder else (tree, {})

  @property
  def freezes_encoder(self) -> bool:
    """Whether the encoder is left as it is, and adapters are trained in its place."""
    return bool(self.arguments["encoder"].get("lora_rank"))

  @property
  def embed_dim(self) -> int:
    """D."""
    return self.arguments["encoder"]["embed_dim"]


def define_model(
  encoder: dict,
  prototype: dict,
  num_free_vectors: int,
  fusion: dict | None = None,
  architecture: str = "bert",
  pooling: str = "mean",
) -> ModelDefinition:
  """Shapes and axes of a `DualEncoder` of these arguments, computing nothing."""
  arguments: dict[str, Any] = {
    "encoder": dict(encoder),
    "prototype": dict(prototype),
    "num_free_vectors": num_free_vectors,
    "fusion": fusion,
    "architecture": architecture,
    "pooling": pooling,
  }
  abstract = nnx.eval_shape(lambda: DualEncoder(**arguments, rngs=nnx.Rngs(0)))
  return ModelDefinition(arguments, *layers.split_params(abstract))
