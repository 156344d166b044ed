"""Puts a pretrained encoder's weights into place, each device getting its own part."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.typing import Tree
from vixml_jax.weights import config as weights_config
from vixml_jax.weights.files import load_pretrained
from vixml_jax.weights.tables import TABLES


def load_encoder(folder: Path, params: Tree, model: ModelDefinition, mesh: Mesh) -> Tree:
  """Parameters whose `encoder` part comes from a Hugging Face folder.

  Args:
    folder: with config.json and safetensors.
    params: initial parameters, for all that is not the encoder.
    model: the model's definition.
    mesh: the devices.

  Raises:
    InputError: if the folder holds another architecture, other sizes, or tensors that do not map one to one.
  """
  weights_config.check_arguments(folder, model.arguments["encoder"])
  table = TABLES[weights_config.read_config(folder)["model_type"]]
  host = load_pretrained(folder, table, model.shapes["encoder"])
  where = sharding.tree_shardings(mesh, model.shapes["encoder"], model.axes["encoder"])
  return params | {"encoder": jax.tree.map(sharding.to_global, host, where)}
