"""Initial parameters: those of a pretrained encoder, put into place part by part, and random ones."""

from pathlib import Path

from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.models import layers
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.run.state import init_params
from vixml_jax.typing import Tree
from vixml_jax.weights import hf_config, peft
from vixml_jax.weights.hf_folder import SafetensorsFolder
from vixml_jax.weights.placement import place
from vixml_jax.weights.tables import TABLES


def load_pretrained_encoder(folder: Path, model: ModelDefinition, mesh: Mesh) -> Tree:
  """The encoder without adapters from a Hugging Face folder, each device getting its own part.

  Args:
    folder: with config.json and safetensors.
    model: the model's definition.
    mesh: the devices.

  Returns:
    `{"encoder": ...}`, the second part of `ModelDefinition.split_base`.

  Raises:
    InputError: if the folder holds another architecture, other sizes, or tensors that do not map one to one.
  """
  hf_config.check_arguments(folder, model.arguments["encoder"])
  table = TABLES[hf_config.read_config(folder)["model_type"]]
  shapes, axes = (model.split_base(tree)[1]["encoder"] for tree in (model.shapes, model.axes))
  return {"encoder": place(table, SafetensorsFolder(folder), shapes, sharding.tree_shardings(mesh, shapes, axes))}


def trainable_params(
  model: ModelDefinition, mesh: Mesh, seed: int, folder: Path | None, adapter: Path | None = None
) -> Tree:
  """Initial values of what is trained.

  Args:
    model: the model's definition.
    mesh: the devices.
    seed: of what is drawn.
    folder: of the pretrained encoder; None to draw the encoder, too.
    adapter: folder of adapters in PEFT's format; None to draw them.

  Raises:
    InputError: if what a folder holds does not fit.
  """
  drawn = init_params(model, mesh, seed, lambda tree: model.split_base(tree)[0])
  if adapter is not None:
    shapes, axes = (model.split_base(tree)[0]["encoder"] for tree in (model.shapes, model.axes))
    drawn |= {"encoder": peft.load_adapter(adapter, shapes, _alpha(model), sharding.tree_shardings(mesh, shapes, axes))}
  return drawn if model.freezes_encoder else layers.join_params(drawn, _base(model, mesh, seed, folder))


def check_adapter(model: ModelDefinition, adapter: Path) -> None:
  """Raises what `trainable_params` would for that folder of adapters, and reads no tensor."""
  peft.check_adapter(adapter, model.split_base(model.shapes)[0]["encoder"], _alpha(model))


def _alpha(model: ModelDefinition) -> float:
  return model.arguments["encoder"]["lora_alpha"]


def frozen_params(model: ModelDefinition, mesh: Mesh, seed: int, folder: Path | None) -> Tree:
  """What is never trained, and therefore in no checkpoint; arguments as for `trainable_params`."""
  return _base(model, mesh, seed, folder) if model.freezes_encoder else {}


def _base(model: ModelDefinition, mesh: Mesh, seed: int, folder: Path | None) -> Tree:
  if folder is None:
    return init_params(model, mesh, seed, lambda tree: model.split_base(tree)[1])
  return load_pretrained_encoder(folder, model, mesh)
