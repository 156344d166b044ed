"""Initial parameters: a pretrained encoder, loaded shard by shard, and random values for everything else."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.parameters import join_params
from vixml_jax.run.state import init_params
from vixml_jax.typing import Tree
from vixml_jax.weights import hf_config, peft, source
from vixml_jax.weights.hf_folder import SafetensorsFolder
from vixml_jax.weights.placement import place
from vixml_jax.weights.tables import TABLES


def load_pretrained_encoder(folder: Path, model: ModelDefinition, mesh: Mesh) -> Tree:
  """Loads an encoder without adapters from a Hugging Face folder; each device reads its own shard.

  Args:
    folder: contains config.json and safetensors.
    model: definition of the model.
    mesh: the devices.

  Returns:
    `{"encoder": ...}`, the second part of `ModelDefinition.split_base`.

  Raises:
    InputError: the folder has another architecture, other sizes, or tensors that do not map one to one.
  """
  hf_config.check_arguments(folder, model.arguments["encoder"])
  table = TABLES[hf_config.read_config(folder)["model_type"]]
  shapes, axes = (model.split_base(tree)[1]["encoder"] for tree in (model.shapes, model.axes))
  return {"encoder": place(table, SafetensorsFolder(folder), shapes, sharding.tree_shardings(mesh, shapes, axes))}


def trainable_params(
  model: ModelDefinition, mesh: Mesh, seed: int, folder: Path | None, adapter: Path | None = None
) -> Tree:
  """Returns the initial values of the trained parameters.

  Args:
    model: definition of the model.
    mesh: the devices.
    seed: seed of the random values.
    folder: folder of the pretrained encoder; None for a random encoder.
    adapter: folder of adapters in PEFT's format; None for new adapters.

  Raises:
    InputError: the contents of a folder do not fit.
  """
  drawn = init_params(model, mesh, seed, lambda tree: model.split_base(tree)[0])
  if adapter is not None:
    shapes, axes = (model.split_base(tree)[0]["encoder"] for tree in (model.shapes, model.axes))
    drawn |= {"encoder": peft.load_adapter(adapter, shapes, _alpha(model), sharding.tree_shardings(mesh, shapes, axes))}
  return drawn if model.freezes_encoder else join_params(drawn, _base(model, mesh, seed, folder))


def check_adapter(model: ModelDefinition, adapter: Path) -> None:
  """Raises what `trainable_params` would raise for a folder of adapters, without reading a tensor."""
  peft.check_adapter(adapter, model.split_base(model.shapes)[0]["encoder"], _alpha(model))


def _alpha(model: ModelDefinition) -> float:
  return model.arguments["encoder"]["lora_alpha"]


def frozen_params(model: ModelDefinition, mesh: Mesh, seed: int, folder: Path | None) -> Tree:
  """Returns the parameters that are never trained and in no checkpoint; arguments as for `trainable_params`."""
  return _base(model, mesh, seed, folder) if model.freezes_encoder else {}


def _base(model: ModelDefinition, mesh: Mesh, seed: int, folder: Path | None) -> Tree:
  if folder is None:
    return init_params(model, mesh, seed, lambda tree: model.split_base(tree)[1])
  return load_pretrained_encoder(folder, model, mesh)


def check_base(model: ModelDefinition, weights_folder: Path | None, workdir: Path, meta: dict[str, Any]) -> None:
  """Checks that a frozen encoder is the one that a checkpoint was trained on.

  Args:
    model: definition of the model to restore.
    weights_folder: folder of the pretrained encoder; None for a random encoder.
    workdir: contains the checkpoint.
    meta: JSON part of the checkpoint.

  Raises:
    InputError: naming both encoders.
  """
  if not model.freezes_encoder:
    return
  wanted, found = meta["weights_sha256"], weight_hashes(weights_folder)
  for name in sorted(wanted.keys() | found.keys()):
    if found.get(name) != wanted.get(name):
      raise InputError(
        f"{weights_folder}: {name} has sha256 {found.get(name)}, but {workdir} was trained on "
        f"{meta['config']['encoder']['pretrained']} with {wanted.get(name)}; set config.encoder.pretrained to that"
      )


def weight_hashes(folder: Path | None) -> dict[str, str]:
  """Returns the sha256 of each safetensors file of a pretrained encoder, by name; empty for a random encoder."""
  return {} if folder is None else source.weight_hashes(folder)
