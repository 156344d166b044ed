"""Chooses the values of the keys that a config leaves to the devices or to the data."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.ragged import Ragged
from vixml_jax.rounding import next_power_of_two
from vixml_jax.run import configuration

_HELD_OUT = "dataset.validation_fraction"  # Follows from the data alone.
OPEN = {
  _HELD_OUT: -1.0,
  "encoder.dtype": "auto",
  "train.row_length": 0,
  "train.chunk_rows": 0,
  "train.free_vectors": 0,
  "train.minutes": -1.0,
  "train.classifier_weight": -1.0,
  "eval.classifier_epochs": -1,
}
"""The value with which a config leaves a key open."""

_MAX_FREE_VECTORS = 65536  # The papers' number.
# Rows have a multiple of this number of tokens; 128 is the width of a matrix unit of TPUs, and of a tile of GPUs.
_CPU_ROW_MULTIPLE, _ACCELERATOR_ROW_MULTIPLE = 16, 128
_SAMPLED_BATCHES = 8
_CPU_MINUTES = 10.0
_CLASSIFIER_WEIGHT = 0.3
_CLASSIFIER_SHARE = 0.25  # Share of the memory for activations that classifiers and their scores may have.
_CLASSIFIER_EPOCHS = 4
_MOST_PAIRS_ON_A_CPU = 2e9  # Two minutes for vectors of 384 dimensions at 100 GFLOP/s.
_FEWEST_HELD_OUT, _MOST_HELD_OUT, _TOO_FEW_HELD_OUT = 500, 8192, 100
_SPARE = 1.05  # Batches of similar items, which training makes, differ more in length than random ones.
# Share of the memory for activations. Other processes use a CPU's as well.
_CPU_SHARE = 0.25
ACCELERATOR_SHARE = 0.5

_log = logging.getLogger(__name__)


def with_started_values(config: ConfigDict, path: Path) -> ConfigDict:
  """Returns the config with the open keys as the run was started with.

  Args:
    config: The whole config.
    path: config.json of the run; if it does not exist, the config is returned unchanged.
  """
  if not path.is_file():
    return config
  started = configuration.flatten_config(configuration.read(path))
  return _updated(config, {key: started[key] for key in left_open(config) if key != _HELD_OUT})


def left_open(config: ConfigDict) -> list[str]:
  """Returns the keys that a config leaves open."""
  values = configuration.flatten_config(config)
  return [key for key, is_open in OPEN.items() if values[key] == is_open]


def with_method(config: ConfigDict) -> ConfigDict:
  """Returns the config with method "mean" where `train.epochs` is 0 and the method has parameters of its own.

  Without training, free vectors and prototype network are random. With that method, the prototype of a label is the
  mean of its embedding and the centroid of its training queries.
  """
  if config.train.epochs or config.method in ("mean", "ngame"):
    return config
  _log.info("train.epochs=0: a prototype is the mean of the label's embedding and its centroid (method=mean)")
  return _updated(config, {"method": "mean"})


def with_held_out(config: ConfigDict, num_queries: int) -> ConfigDict:
  """Returns the config with `dataset.validation_fraction` chosen where it is -1.

  A twentieth of the training queries is held out, but at least 500 and at most 8,192 of them, and at most a tenth. If
  that is fewer than 100, none are held out, and nothing is chosen, fitted or compared that would need them.

  Args:
    config: The whole config.
    num_queries: N, the number of training queries.
  """
  if config.dataset.validation_fraction != OPEN[_HELD_OUT]:
    return config
  wanted = min(max(num_queries / 20, _FEWEST_HELD_OUT), _MOST_HELD_OUT, num_queries / 10)
  if wanted >= _TOO_FEW_HELD_OUT:
    return _updated(config, {_HELD_OUT: wanted / num_queries})
  _log.info(
    "%d training queries are too few to hold some out: there is no blend and no baseline, and the settings of "
    "retrieval are not chosen",
    num_queries,
  )
  off = {"eval.retrieval_choose": False, "eval.blend": False, "eval.classifier_share": 0.0, "eval.baselines": ()}
  return _updated(config, {_HELD_OUT: 0.0} | off)


def with_dtype(config: ConfigDict, platform: str) -> ConfigDict:
  """Returns the config with `encoder.dtype` chosen where it is "auto".

  It is float32 on CPUs, which compute bfloat16 more slowly, and bfloat16 on accelerators.
  """
  if config.encoder.dtype != OPEN["encoder.dtype"]:
    return config
  return _updated(config, {"encoder.dtype": "float32" if platform == "cpu" else "bfloat16"})


def with_minutes(config: ConfigDict, platform: str) -> ConfigDict:
  """Returns the config with `train.minutes` chosen where it is -1.

  It is 10 on CPUs, where all epochs of a large data set would take days, and 0 on accelerators, for no limit.
  """
  if config.train.minutes != OPEN["train.minutes"]:
    return config
  return _updated(config, {"train.minutes": _CPU_MINUTES if platform == "cpu" else 0.0})


def with_row_length(config: ConfigDict, longest: int, platform: str) -> ConfigDict:
  """Returns the config with `train.row_length` chosen where it is 0.

  It is the longest item, and on CPUs twice the longest item, rounded up. Longer rows are filled better, but a token
  costs more in them, because its scores with the whole row are computed.

  Args:
    config: The whole config.
    longest: Number of tokens of the longest possible item, images and phrases included.
    platform: Platform of the devices. Accelerators need multiples of 128 tokens; on CPUs it is a multiple of 16.
  """
  if config.train.row_length:
    return config
  wanted, multiple = (2 * longest, _CPU_ROW_MULTIPLE) if platform == "cpu" else (longest, _ACCELERATOR_ROW_MULTIPLE)
  return _updated(config, {"train.row_length": -(-wanted // multiple) * multiple})


def with_free_vectors(config: ConfigDict, num_labels: int, devices: int = 1) -> ConfigDict:
  """Returns the config with `train.free_vectors` chosen where it is 0.

  The choice is the power of two at or below a quarter of the labels, at most 65,536, and at least one for each device.

  Args:
    config: The whole config.
    num_labels: L.
    devices: Number of devices that the vectors are split over.
  """
  if config.train.free_vectors:
    return config
  number = min(2 ** (max(num_labels // 4, 1).bit_length() - 1), _MAX_FREE_VECTORS)
  return _updated(config, {"train.free_vectors": max(number, next_power_of_two(devices))})


def with_classifier_weight(config: ConfigDict, num_labels: int, budget: float) -> ConfigDict:
  """Returns the config with `train.classifier_weight` chosen where it is -1.

  It is 0.3. Where classifiers and the scores of a step would take more than a quarter of the budget, it is 0: for each
  label, four float32 vectors of the width of embeddings, and three float32 values for each query of a batch.

  Args:
    config: The whole config.
    num_labels: L.
    budget: Bytes of all devices together that activations may have; see `activation_budget`.
  """
  if config.train.classifier_weight != OPEN["train.classifier_weight"]:
    return config
  needed = np.dtype(np.float32).itemsize * num_labels * (4.0 * config.encoder.embed_dim + 3 * config.train.batch_size)
  fits = needed <= _CLASSIFIER_SHARE * budget
  return _updated(config, {"train.classifier_weight": _CLASSIFIER_WEIGHT if config.train.epochs and fits else 0.0})


def with_classifier_epochs(config: ConfigDict, num_queries: int, num_labels: int, platform: str) -> ConfigDict:
  """Returns the config with `eval.classifier_epochs` chosen where it is -1.

  It is 4. Without a blend, which alone reads classifiers, it is 0, and on CPUs also where it would take more than a few
  minutes.

  Args:
    config: The whole config.
    num_queries: N, the number of training queries.
    num_labels: L.
    platform: Platform of the devices.
  """
  if config.eval.classifier_epochs != OPEN["eval.classifier_epochs"]:
    return config
  too_long = platform == "cpu" and num_queries * num_labels > _MOST_PAIRS_ON_A_CPU
  return _updated(config, {"eval.classifier_epochs": _CLASSIFIER_EPOCHS if config.eval.blend and not too_long else 0})


def with_chunk_rows(
  config: ConfigDict,
  queries: Items,
  positives: Ragged,
  labels: Items,
  layout: PackedLayout,
  *,
  unit: int,
  budget: float,
) -> ConfigDict:
  """Returns the config with `train.chunk_rows` chosen, which must be open.

  The choice holds a whole batch, if the activations of so many rows fit the budget. Otherwise it is the largest part of
  a batch that does, where the number of parts is a power of two.

  Args:
    config: The whole config, whose other open keys are chosen.
    queries: The training queries.
    positives: Label ids of each query.
    labels: All labels.
    layout: Shape of packed rows. Its `chunk_rows` is not used.
    unit: The choice is a multiple of this number, which is that of the devices that share the rows of a chunk.
    budget: Bytes of all these devices together that activations may have; see `activation_budget`.
  """
  rows, length = _batch_rows(queries, positives, labels, layout, config), layout.row_length
  most = max(budget / (activation_bytes(config) * length), unit)
  chunks = 1
  while rows / chunks > most:
    chunks *= 2
  return _updated(config, {"train.chunk_rows": math.ceil(rows / (chunks * unit)) * unit})


def activation_budget(mesh: Mesh) -> float:
  """Returns the bytes that activations may have on all devices that share the rows of a chunk.

  It is half of the memory of accelerators, and a quarter of that of a machine whose CPU is the device. All processes
  get the number of the first one, because their devices may report a little more or less.
  """
  share = _CPU_SHARE if sharding.platform_of(mesh) == "cpu" else ACCELERATOR_SHARE
  budget = share * sharding.device_memory(mesh.local_devices) * sharding.row_devices(mesh)
  return float(multihost_utils.broadcast_one_to_all(budget)) if jax.process_count() > 1 else budget


def activation_bytes(config: ConfigDict) -> int:
  """Returns an estimate of the bytes of activations that a token needs from the forward to the backward pass.

  A layer stores about ten vectors of the model's width and three of the feed-forward network's in `encoder.dtype`, and
  three float32 values for each pair of a head and a token of the row. Layers that are recomputed store their input.
  """
  encoder = config.encoder
  size = np.dtype(encoder.dtype).itemsize
  layer = size * (10 * encoder.embed_dim + 3 * encoder.mlp_dim) + 12 * encoder.num_heads * config.train.row_length
  if encoder.remat:
    return layer + encoder.num_layers * size * encoder.embed_dim
  return encoder.num_layers * layer


def log_choices(config: ConfigDict, result: ConfigDict) -> None:
  """Logs the values of the keys that `config` left open, which `result` has."""
  values = configuration.flatten_config(result)
  found = [f"{key}={values[key]}" for key in left_open(config)]
  if found:
    _log.info("chosen for these data and devices: %s", ", ".join(found))


def _batch_rows(queries: Items, positives: Ragged, labels: Items, layout: PackedLayout, config: ConfigDict) -> int:
  """Returns the number of rows that hold a batch, from sampled batches."""
  rng, batch_size = np.random.default_rng(config.seed), min(config.train.batch_size, len(queries))
  one_by_one, rows = dataclasses.replace(layout, chunk_rows=1), 0
  for _ in range(_SAMPLED_BATCHES):
    drawn = queries.take(rng.integers(0, len(queries), batch_size))
    drawn_labels = labels.take(positives.values[rng.integers(0, len(positives.values), batch_size)])
    rows = max(rows, len(pack(drawn.followed_by(drawn_labels), one_by_one, round_up=False).tokens))
  return math.ceil(_SPARE * rows)


def _updated(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(values)
  return config
