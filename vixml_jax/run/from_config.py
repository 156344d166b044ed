"""Turns a config into the parts of a run that need no data: model definition, row layout, sizes, adapters."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict
import optax

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.input.packing import PackedLayout
from vixml_jax.input.prompt import parse_template
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.models.attention import choose
from vixml_jax.models.attention_call import AttentionCall, reach_of
from vixml_jax.models.definition import ModelDefinition, define_model
from vixml_jax.rounding import next_power_of_two
from vixml_jax.run.state import TrainState, abstract_state


def encoder_arguments(config: ConfigDict) -> dict[str, Any]:
  """Returns the keyword arguments of the encoder that a config describes."""
  encoder = config.encoder.to_dict()
  for name in ("architecture", "pooling", "pretrained", "random_init"):
    del encoder[name]
  encoder["remat_saved"] = tuple(encoder["remat_saved"])
  if config.encoder.architecture == "decoder":
    del encoder["adapter"]
    encoder["rope_scaling"] = tuple(encoder["rope_scaling"]) or None
  else:
    del encoder["base_dtype"]  # Only decoders have a frozen base.
  return encoder


def model_from_config(config: ConfigDict) -> ModelDefinition:
  """Returns the model that a config describes, without values."""
  fusion = None
  if config.images:
    fusion = dict(
      feature_dim=config.features.dim,
      method=config.fusion.method,
      adapter=config.fusion.adapter,
      residual=config.fusion.residual > 0,
      init=config.train.new_init,
    )
  return define_model(
    encoder_arguments(config),
    config.prototype.to_dict() | {"init": config.train.new_init},
    config.train.free_vectors,
    fusion,
    config.encoder.architecture,
    config.encoder.pooling,
    config.method,
  )


def state_from_config(
  config: ConfigDict,
  model: ModelDefinition,
  optimizer: optax.GradientTransformation,
  num_queries: int,
  num_labels: int,
  mesh: Mesh,
) -> TrainState:
  """Returns the state of a run that a config describes, as `state.abstract_state`."""
  has_classifiers = config.train.classifier_weight > 0
  return abstract_state(
    model, optimizer, num_queries, num_labels, config.train.bank_dtype, mesh, has_classifiers=has_classifiers
  )


def attention_call(config: ConfigDict, mesh: Mesh) -> AttentionCall:
  """Returns the attention of a training step."""
  encoder, is_decoder = config.encoder, config.encoder.architecture == "decoder"
  return AttentionCall(
    platform=sharding.platform_of(mesh),
    rows=config.train.chunk_rows,
    length=config.train.row_length,
    num_heads=encoder.num_heads,
    num_kv_heads=encoder.num_kv_heads if is_decoder else encoder.num_heads,
    head_dim=encoder.head_dim if is_decoder else encoder.embed_dim // encoder.num_heads,
    dtype=encoder.dtype,
    segmented=True,
    dropout=not is_decoder and encoder.attention_dropout > 0,
    windowed=is_decoder
    and encoder.global_every > 1
    and config.train.row_length > reach_of(encoder.window, causal=not encoder.bidirectional),
    row_devices=sharding.row_devices(mesh),
    head_devices=mesh.shape["tensor"],
  )


def check_attention(config: ConfigDict, mesh: Mesh) -> None:
  """Checks that the devices can compute the attention that a config asks for, in training and without dropout.

  Raises:
    InputError: `encoder.attention` names an implementation that cannot.
  """
  try:
    choose(config.encoder.attention, attention_call(config, mesh))
  except ValueError as error:
    raise InputError(f"config.encoder.{error}; use auto, or change the key that the message names") from error


def chooses_retrieval(config: ConfigDict) -> bool:
  """Returns whether lambda and temperature of retrieval augmentation are chosen on held-out queries."""
  return config.eval.retrieval_augmented and config.eval.retrieval_choose


def adapter_folder(config: ConfigDict) -> Path | None:
  """Returns the folder of the adapters that a run starts with; None for new adapters."""
  adapter = config.encoder.get("adapter")
  return Path(adapter) if adapter else None


def layout_from_config(config: ConfigDict, tokenizer: Tokenizer) -> PackedLayout:
  """Returns the shape of the packed rows that a config describes.

  Args:
    config: the whole config. A `train.row_length` of 0 is not checked.
    tokenizer: tokenizer of the texts, for the phrases of the prompt.

  Raises:
    InputError: an item may be longer than a row, or than the encoder's positions.
  """
  prompt, train, length = config.prompt, config.train, config.dataset.max_length
  images_are_tokens = config.images > 0 and config.fusion.method == "early"
  template = parse_template(prompt.template, prompt.phrases.to_dict(), prompt.eos, tokenizer, images_are_tokens)
  layout = PackedLayout(train.row_length, train.chunk_rows, config.images, template, tokenizer.special_tokens)
  limits = {"train.row_length": train.row_length} if train.row_length else {}
  if config.encoder.architecture == "bert":
    limits["encoder.max_position"] = config.encoder.max_position
  longest = layout.longest(length)
  for key, limit in limits.items():
    if longest > limit:
      raise InputError(
        f"config.{key}={limit}: an item may have {longest} tokens (dataset.max_length={length}, "
        f"images={config.images} and the phrases of prompt.template); raise config.{key}"
      )
  return layout


def check_sizes(config: ConfigDict, num_labels: int, tokenizer_size: int, mesh: Mesh) -> None:
  """Checks what depends on the data and the mesh, before anything expensive starts.

  Args:
    config: the whole config.
    num_labels: L.
    tokenizer_size: number of token ids of the tokenizer.
    mesh: the devices.

  Raises:
    InputError: naming the key that does not fit.
  """
  free_vectors = config.train.free_vectors
  # Vectors are split over the devices, so that there may be more than labels.
  one_each = next_power_of_two(max(num_labels, sharding.row_devices(mesh)))
  if free_vectors > one_each and config.method in ("prime", "dexa"):
    raise InputError(
      f"train.free_vectors={free_vectors}: {one_each} give each of the {num_labels} labels its own; use a power of "
      f"two up to {one_each}"
    )
  if tokenizer_size > config.encoder.vocab_size:
    raise InputError(
      f"encoder.vocab_size={config.encoder.vocab_size}: the tokenizer in {config.encoder.pretrained} has "
      f"{tokenizer_size} tokens; use weights with at least as many"
    )
  check_divides(config, mesh)


def check_divides(config: ConfigDict, mesh: Mesh) -> None:
  """Checks that the devices divide the batch and the chunks.

  Raises:
    InputError: naming the key.
  """
  rows = sharding.row_devices(mesh)
  for key in ("batch_size", "chunk_rows"):
    if config.train[key] % rows:
      raise InputError(f"train.{key}={config.train[key]}: must be a multiple of mesh.data x mesh.fsdp = {rows}")
  if sharding.padded_rows(1) % mesh.size:
    raise InputError(
      f"mesh: it has {mesh.size} devices, but their number must divide {sharding.padded_rows(1)}, so that embeddings "
      "can be split evenly; use fewer devices"
    )
