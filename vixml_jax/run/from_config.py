"""Turns a config into what training and evaluation work with: data, images, model, optimizer, mesh."""

import dataclasses
import functools
import logging
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import optax

from vixml_jax import datasets, sharding
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import inverse_propensity
from vixml_jax.images.extraction import prepare_features
from vixml_jax.images.feature_set import FeatureSet, open_features
from vixml_jax.images.features import ImageFeatures, load_image_features
from vixml_jax.input.batches import TrainingQueries, steps_per_epoch
from vixml_jax.input.corpus import Corpus, load_corpus
from vixml_jax.input.hold_out import hold_out
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout
from vixml_jax.input.prompt import parse_template
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.losses import LossConfig
from vixml_jax.models.definition import ModelDefinition, define_model
from vixml_jax.run.pretrained import frozen_params
from vixml_jax.run.state import TrainState, abstract_state
from vixml_jax.training.optimizer import make_optimizer
from vixml_jax.typing import Tree
from vixml_jax.weights import source

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
  """A config made concrete.

  Attributes:
    config: the whole config.
    workdir: where outputs go.
    mesh: the devices.
    weights_folder: local folder of the pretrained encoder; None to draw its initial values.
    corpus: all splits, tokenized.
    bank: image features of all splits; None for texts only.
    items: texts and images of "train", "test" and "labels".
    query_rows: int64 [N], which training queries are trained on: those with labels, not held out.
    validation_rows: int64, the held-out ones.
    queries: what batches are drawn from, row i being training query `query_rows[i]`.
    model, optimizer, abstract, layout, loss: what to train and how.
  """

  config: ConfigDict
  workdir: Path
  mesh: Mesh
  weights_folder: Path | None
  corpus: Corpus
  bank: ImageFeatures | None
  items: dict[str, Items]
  query_rows: np.ndarray
  validation_rows: np.ndarray
  queries: TrainingQueries
  model: ModelDefinition
  optimizer: optax.GradientTransformation
  abstract: TrainState
  layout: PackedLayout
  loss: LossConfig

  @property
  def steps_per_epoch(self) -> int:
    """Batches in an epoch; the last may be smaller."""
    return steps_per_epoch(len(self.queries), self.config.train.batch_size)

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return self.config.train.epochs * self.steps_per_epoch

  @property
  def base_key(self) -> jax.Array:
    """The key that every random number of the devices comes from."""
    return jax.random.key(self.config.seed, impl=self.config.train.rng_impl)

  @property
  def data_fingerprint(self) -> str:
    """What identifies the data that a checkpoint was trained on."""
    return self.corpus.fingerprint + (f"+{self.bank.fingerprint}" if self.bank else "")

  @functools.cached_property
  def frozen(self) -> Tree:
    """Parameters that are not trained, loaded when they are first asked for."""
    return frozen_params(self.model, self.mesh, self.config.seed, self.weights_folder)

  @functools.cached_property
  def encoder(self) -> ItemEncoder:
    """What embeds queries and labels with given values of the parameters that are trained."""
    return ItemEncoder(self.model, self.layout, self.mesh, self.bank, self.frozen)


def label_weights(config: ConfigDict, frequencies: np.ndarray, num_queries: int) -> np.ndarray:
  """float64 [L], the weight with which a label is drawn as a query's positive."""
  if config.train.positive_sampling == "uniform":
    return np.ones(len(frequencies))
  return inverse_propensity(frequencies, num_queries, config.train.sampling_a, config.train.sampling_b)


def model_of(config: ConfigDict) -> ModelDefinition:
  """The model that a config describes, without values."""
  encoder = config.encoder.to_dict()
  architecture, pooling, *_ = (encoder.pop(name) for name in ("architecture", "pooling", "pretrained", "random_init"))
  if architecture == "decoder":
    del encoder["adapter"]
    encoder["rope_scaling"] = tuple(encoder["rope_scaling"]) or None
  fusion = None
  if config.images:
    fusion = dict(
      feature_dim=config.features.dim,
      method=config.fusion.method,
      adapter=config.fusion.adapter,
      residual=config.fusion.residual > 0,
    )
  return define_model(encoder, config.prototype.to_dict(), config.train.free_vectors, fusion, architecture, pooling)


def adapter_folder(config: ConfigDict) -> Path | None:
  """Folder of the adapters that a run begins with; None for fresh ones."""
  adapter = config.encoder.get("adapter")
  return Path(adapter).expanduser() if adapter else None


def layout_of(config: ConfigDict, tokenizer: Tokenizer) -> PackedLayout:
  """The shape of the packed rows that a config describes.

  Args:
    config: the whole config.
    tokenizer: of the texts, for the phrases of the prompt.

  Raises:
    InputError: an item may be longer than a row, or than the encoder's positions.
  """
  prompt, train, length = config.prompt, config.train, config.dataset.max_length
  images_are_tokens = config.images > 0 and config.fusion.method == "early"
  template = parse_template(prompt.template, prompt.phrases.to_dict(), prompt.eos, tokenizer, images_are_tokens)
  layout = PackedLayout(train.row_length, train.chunk_rows, config.images, template, tokenizer.special_tokens)
  rooms = {"train.row_length": train.row_length}
  if config.encoder.architecture == "bert":
    rooms["encoder.max_position"] = config.encoder.max_position
  for key, room in rooms.items():
    if layout.longest(length) > room:
      raise InputError(
        f"config.{key}={room}: an item may have {layout.longest(length)} tokens (dataset.max_length="
        f"{length}, images={config.images} and the phrases of prompt.template); raise it"
      )
  return layout


def optimizer_of(config: ConfigDict, model: ModelDefinition, total_steps: int) -> optax.GradientTransformation:
  """The optimizer that a config describes."""
  train = config.train
  return make_optimizer(
    model.split(model.shapes)[0],
    learning_rate=train.learning_rate,
    new_learning_rate=train.new_learning_rate,
    free_vector_learning_rate=train.free_vector_learning_rate,
    warmup_steps=train.warmup_steps,
    total_steps=total_steps,
    weight_decay=train.weight_decay,
    adam_eps=train.adam_eps,
    clip_norm=train.clip_norm or None,
  )


def set_up(config: ConfigDict, workdir: Path, extract: bool = True) -> Run:
  """Prepares the data where missing, and builds everything but values.

  Args:
    config: the whole config.
    workdir: where outputs go.
    extract: also make image features where `features.checkpoint` names a tower; else they must be there.

  Raises:
    InputError: for whatever is wrong with the config, the data or the weights' folder.
  """
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  folder = source.resolve(config.encoder.pretrained)
  data = config.dataset
  layout = layout_of(config, Tokenizer(folder, data.max_length))
  builder = datasets.prepare(data.name, data.raw_dir, data.data_dir)
  bank = _open_bank(config, builder, mesh, extract)  # Before minutes go to tokens: features may be missing.
  corpus = load_corpus(builder, folder, data.max_length, tuple(data.text_fields), Path(data.data_dir) / "tokens")
  held_out = hold_out(corpus.train_tokens, data.validation_fraction, config.seed)
  labeled = corpus.train_labels.lengths > 0
  items = _items(corpus, bank)
  query_rows = np.flatnonzero(labeled & ~held_out)
  if not len(query_rows):
    raise InputError(f"{data.name}: no training query has a label; check target_ind in trn.json.gz")
  whole = len(query_rows) == len(corpus.train_tokens)
  train_items = items["train"] if whole else items["train"].take(query_rows)
  labels = corpus.train_labels if whole else corpus.train_labels.take(query_rows)
  frequencies = np.bincount(labels.values, minlength=corpus.num_labels)
  queries = TrainingQueries(
    train_items,
    labels,
    items["labels"],
    label_weights(config, frequencies, len(query_rows)),
    config.fusion.modality_dropout if config.images else 0.0,
  )
  config = settle_free_vectors(config, corpus.num_labels)
  _check_sizes(config, corpus, mesh)
  model = model_of(config)
  total = config.train.epochs * steps_per_epoch(len(queries), config.train.batch_size)
  optimizer = optimizer_of(config, model, total)
  return Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    weights_folder=None if config.encoder.random_init else folder,
    corpus=corpus,
    bank=bank,
    items=items,
    query_rows=query_rows,
    validation_rows=np.flatnonzero(labeled & held_out),
    queries=queries,
    model=model,
    optimizer=optimizer,
    abstract=abstract_state(model, optimizer, len(queries), corpus.num_labels, config.train.bank_dtype, mesh),
    layout=layout,
    loss=LossConfig(**config.loss.to_dict()),
  )


def _open_bank(config: ConfigDict, builder, mesh: Mesh, extract: bool) -> ImageFeatures | None:
  """The image features of a config with images."""
  if not config.images:
    return None
  data_dir, wanted = config.dataset.data_dir, config.features
  if extract and wanted.checkpoint:
    features = prepare_features(
      builder,
      data_dir,
      wanted.checkpoint,
      name=wanted.name,
      variant=wanted.variant or None,
      preprocessing=wanted.preprocessing,
    )
  else:
    features = open_features(builder, data_dir, wanted.name)
  _check_features(config, features)
  return load_image_features(features, config.images, Path(data_dir) / "feature_banks").placed(mesh, config.fusion.bank)


def _check_features(config: ConfigDict, features: FeatureSet) -> None:
  if features.dim != config.features.dim:
    raise InputError(
      f"config.features.dim={config.features.dim}: the features {config.features.name} of "
      f"{config.dataset.name} have {features.dim}; set it to that"
    )


def _items(corpus: Corpus, bank: ImageFeatures | None) -> dict[str, Items]:
  tokens = {"train": corpus.train_tokens, "test": corpus.test_tokens, "labels": corpus.label_tokens}
  if bank is None:
    return {split: Items.of_texts(texts) for split, texts in tokens.items()}
  return {split: Items(texts, bank.images[split]) for split, texts in tokens.items()}


def settle_free_vectors(config: ConfigDict, num_labels: int) -> ConfigDict:
  """Settles `train.free_vectors=0`: the power of two nearest below a quarter of the labels, at most 65,536."""
  if config.train.free_vectors:
    return config
  config = config.copy_and_resolve_references()
  config.train.free_vectors = min(2 ** (max(num_labels // 4, 1).bit_length() - 1), 65536)
  _log.info("train.free_vectors=%d for %d labels", config.train.free_vectors, num_labels)
  return config


def _check_sizes(config: ConfigDict, corpus: Corpus, mesh: Mesh) -> None:
  """What depends on the data and the mesh, before any time is spent."""
  free_vectors = config.train.free_vectors
  one_each = 1 << (corpus.num_labels - 1).bit_length()
  if free_vectors > one_each:
    raise InputError(
      f"train.free_vectors={free_vectors}: {one_each} give each of the {corpus.num_labels} labels its "
      "own; use a power of two up to that"
    )
  if corpus.vocab_size > config.encoder.vocab_size:
    raise InputError(
      f"encoder.vocab_size={config.encoder.vocab_size}: the tokenizer in {config.encoder.pretrained} "
      f"has {corpus.vocab_size} tokens; name weights that know them all"
    )
  rows = sharding.row_devices(mesh)
  for key in ("batch_size", "chunk_rows"):
    if config.train[key] % rows:
      raise InputError(f"train.{key}={config.train[key]}: must divide by mesh.data x mesh.fsdp = {rows}")
