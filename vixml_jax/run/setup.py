"""Initializes a run: everything that training and evaluation share, before any parameter has a value."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import ItemEncoder, encoding_layout
from vixml_jax.errors import InputError
from vixml_jax.files import make_folder
from vixml_jax.input.packing import PackedLayout
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.run import chosen, configuration
from vixml_jax.run.data import RunData, load_data, prepare_data
from vixml_jax.run.from_config import (
  check_attention,
  check_sizes,
  chooses_retrieval,
  encoder_arguments,
  layout_from_config,
  model_from_config,
)
from vixml_jax.run.mesh_choice import with_mesh
from vixml_jax.run.pretrained import frozen_params
from vixml_jax.run.workdir import CONFIG
from vixml_jax.weights import hf_config, source


@dataclasses.dataclass(frozen=True)
class RunSetup:
  """The result of `set_up_run`.

  Attributes:
    config: the whole config, with everything chosen that depends on the data.
    mesh: the devices.
    pretrained: folder of the pretrained encoder and its tokenizer.
    layout: shape of packed rows.
    data: the data set.
    model: definition of the model, without values.
  """

  config: ConfigDict
  mesh: Mesh
  pretrained: Path
  layout: PackedLayout
  data: RunData
  model: ModelDefinition

  @property
  def weights_folder(self) -> Path | None:
    """Folder of the pretrained encoder's weights; None where the encoder is random."""
    return None if self.config.encoder.random_init else self.pretrained

  def load_encoder(self) -> ItemEncoder:
    """Loads the frozen parameters and returns what encodes items, given the trained parameters."""
    frozen = frozen_params(self.model, self.mesh, self.config.seed, self.weights_folder)
    layout = encoding_layout(self.layout, self.mesh)
    return ItemEncoder(self.model, layout, self.mesh, self.data.image_features, frozen)


def set_up_run(config: ConfigDict, workdir: Path, *, extract: bool) -> RunSetup:
  """Initializes a run: steps 1 to 7 of the list in `experiment.train_and_evaluate`.

  Args:
    config: the whole config, checked by `configuration.check`.
    workdir: folder of the run's outputs.
    extract: make image features where `features.checkpoint` names a tower; otherwise they must exist.

  Raises:
    InputError: something is wrong with the config, the data, the weights' folder or the workdir.
  """
  given = config
  config = with_mesh(chosen.with_method(config), workdir)
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  platform = sharding.platform_of(mesh)
  config = chosen.with_dtype(chosen.with_started_values(config, workdir / CONFIG), platform)
  config = chosen.with_minutes(config, platform)
  configuration.check_same_recipe(config, workdir / CONFIG, left_open=chosen.left_open(config))
  check_attention(config, mesh)
  pretrained = source.resolve(config.encoder.pretrained, weights=not config.encoder.random_init)
  if not config.encoder.random_init:
    hf_config.check_arguments(pretrained, encoder_arguments(config))
  tokenizer = Tokenizer(pretrained, config.dataset.max_length, config.encoder.vocab_size)
  layout = layout_from_config(config, tokenizer)
  config = chosen.with_row_length(config, layout.longest(config.dataset.max_length), platform)
  check_attention(config, mesh)  # Again, since it also depends on the length of the rows.
  builder = prepare_data(config)
  config = chosen.with_held_out(config, builder.info.splits["train"].num_examples)
  data = load_data(config, builder, tokenizer, mesh, extract=extract)
  config = chosen.with_free_vectors(config, data.num_labels, sharding.row_devices(mesh))
  budget = chosen.activation_budget(mesh)
  config = chosen.with_classifier_weight(config, data.num_labels, budget)
  config = chosen.with_classifier_epochs(config, len(data.train_rows), data.num_labels, platform)
  layout = dataclasses.replace(layout, row_length=config.train.row_length)
  if not config.train.chunk_rows:  # With held-out queries, taking the others copies them.
    config = chosen.with_chunk_rows(
      config,
      data.train_items,
      data.train_labels,
      data.items["labels"],
      layout,
      unit=sharding.row_devices(mesh),
      budget=budget,
    )
  layout = dataclasses.replace(layout, chunk_rows=config.train.chunk_rows)
  chosen.log_choices(given, config)
  check_sizes(config, data.num_labels, tokenizer.vocab_size, mesh)
  _check_held_out(config, data)
  model = model_from_config(config)
  _make_workdir(workdir)
  configuration.check_same_recipe(config, workdir / CONFIG)
  return RunSetup(config, mesh, pretrained, layout, data, model)


def _check_held_out(config: ConfigDict, data: RunData) -> None:
  """Checks that there are held-out queries where the config chooses or evaluates on them."""
  if (chooses_retrieval(config) or config.eval.split == "validation") and not len(data.validation_rows):
    raise InputError(
      f"config.dataset.validation_fraction={config.dataset.validation_fraction}: holds out none of the "
      f"{len(data.corpus.train_tokens)} training queries of {config.dataset.name}; raise it, or set "
      "config.eval.retrieval_choose=False and config.eval.split=test"
    )


def write_config(setup: RunSetup, workdir: Path) -> None:
  """Writes the config.json of a run whose checkpoint fits its data and its encoder; only the first process does.

  Raises:
    InputError: The disk is full.
  """
  if jax.process_index() == 0:
    configuration.write(setup.config, workdir / CONFIG)


def _make_workdir(workdir: Path) -> None:
  """Makes the workdir; only the first process does."""
  if jax.process_index() > 0:
    return
  try:
    make_folder(workdir)
  except OSError as error:
    raise InputError(f"{workdir}: cannot be made ({error.strerror}); give another --workdir") from error
