"""Puts a pretrained encoder's weights into place, each device getting its own part."""

from pathlib import Path

from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.typing import Tree
from vixml_jax.weights import config as weights_config
from vixml_jax.weights import engine, peft
from vixml_jax.weights.files import SafetensorsFolder
from vixml_jax.weights.placement import place
from vixml_jax.weights.tables import TABLES


def load_encoder(folder: Path, params: Tree, model: ModelDefinition, mesh: Mesh) -> Tree:
  """Parameters whose `encoder` part comes from a Hugging Face folder.

  Args:
    folder: with config.json and safetensors.
    params: initial parameters, for all that is not the encoder, and for the encoder's adapters. What the folder
      fills may be absent.
    model: the model's definition.
    mesh: the devices.

  Raises:
    InputError: if the folder holds another architecture, other sizes, or tensors that do not map one to one.
  """
  weights_config.check_arguments(folder, model.arguments["encoder"])
  table = TABLES[weights_config.read_config(folder)["model_type"]]
  shapes, _ = peft.split_adapters(model.shapes["encoder"])
  axes, _ = peft.split_adapters(model.axes["encoder"])
  base = place(table, SafetensorsFolder(folder), shapes, sharding.tree_shardings(mesh, shapes, axes))
  _, adapters = peft.split_adapters(params.get("encoder", {}))
  return params | {"encoder": engine.unflatten(engine.flatten(base) | engine.flatten(adapters))}
