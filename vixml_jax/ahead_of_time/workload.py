"""A config on a data set of some size, without data: model, number of steps, and a batch of made-up items."""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.input.batches import Batch, TrainingQueries, make_batch, steps_per_epoch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.ragged import Ragged
from vixml_jax.run import chosen
from vixml_jax.run.from_config import layout_from_config, model_from_config

_PLATFORM = "tpu"  # Open keys are chosen alike for all accelerators.
_CHUNK_MULTIPLE = 8  # So that the chunk can be halved where it does not fit.
_SHORTEST = 3  # Tokens of the shortest synthetic text: two special tokens and one of its own.


@dataclasses.dataclass(frozen=True)
class Workload:
  """A config on a data set of some size, without values and without devices.

  Attributes:
    config: The whole config.
    size: Size of the data set.
    model: Definition of the model.
  """

  config: ConfigDict
  size: DataSize
  model: ModelDefinition

  @classmethod
  def of(
    cls, config: ConfigDict, size: DataSize, row_devices: int = 1, activation_budget: float = math.inf
  ) -> "Workload":
    """Returns the workload of a config. Open keys are chosen as on accelerators.

    Args:
      config: The whole config.
      size: Size of the data set.
      row_devices: Number of accelerators that share the rows of a chunk.
      activation_budget: Bytes of activations that all of them can hold.
    """
    config = chosen.with_held_out(chosen.with_dtype(config, _PLATFORM), size.train)
    config = chosen.with_free_vectors(chosen.with_minutes(config, _PLATFORM), size.labels)
    config = chosen.with_classifier_weight(config, size.labels, activation_budget)
    config = chosen.with_classifier_epochs(config, size.train, size.labels, _PLATFORM)
    layout = _layout(config)
    config = chosen.with_row_length(config, layout.longest(config.dataset.max_length), _PLATFORM)
    if not config.train.chunk_rows:
      queries, labels = (_synthetic_items(config.train.batch_size, size, config, seed) for seed in range(2))
      own = _one_each(config.train.batch_size)
      layout = dataclasses.replace(layout, row_length=config.train.row_length)
      unit = math.lcm(row_devices, _CHUNK_MULTIPLE)
      config = chosen.with_chunk_rows(config, queries, own, labels, layout, unit=unit, budget=activation_budget)
    return cls(config, size, model_from_config(config))

  @property
  def steps(self) -> int:
    """Steps of the whole run."""
    return self.config.train.epochs * steps_per_epoch(self.size.train, self.config.train.batch_size)

  def with_chunk_rows(self, rows: int) -> "Workload":
    """Returns the same workload with another chunk size."""
    return self if rows == self.config.train.chunk_rows else self.with_keys({"train.chunk_rows": rows})

  def with_keys(self, values: Mapping[str, Any]) -> "Workload":
    """Returns the workload with other values of the config's keys.

    Args:
      values: Values by dotted key.
    """
    config = self.config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(values))
    return Workload(config, self.size, model_from_config(config))

  @functools.cached_property
  def batch(self) -> Batch:
    """A batch of synthetic items with the lengths of the data set, packed as in training."""
    size, train = self.size, self.config.train
    queries, labels = (_synthetic_items(train.batch_size, size, self.config, seed) for seed in range(2))
    own = _one_each(train.batch_size)
    dropout = self.config.fusion.modality_dropout if self.config.images else 0.0
    data = TrainingQueries(queries, own, labels, np.ones(train.batch_size), dropout, train.classifier_weight > 0)
    return make_batch(data, np.arange(train.batch_size), train.batch_size, self.layout, seed=0, epoch=0, step=0)

  @property
  def layout(self) -> PackedLayout:
    """Shape of the packed rows."""
    return _layout(self.config)


class _SyntheticTokenizer(Tokenizer):
  """A tokenizer of one token a word, with as many special tokens as BERT's or Qwen's; the real one needs weights."""

  def __init__(self, architecture: str):
    self.special_tokens = 2 if architecture == "bert" else 0

  def uncut(self, text: str) -> tuple[int, ...]:
    """Returns as many ids as there are words and special tokens."""
    return (0,) * (len(text.split()) + self.special_tokens)

  def token_id(self, token: str) -> int:
    """Returns 0: every token is known."""
    return 0


def _layout(config: ConfigDict) -> PackedLayout:
  return layout_from_config(config, _SyntheticTokenizer(config.encoder.architecture))


def _one_each(count: int) -> Ragged:
  """Returns rows 0 to `count` - 1 of which each has its own number."""
  return Ragged.of_lengths(np.arange(count, dtype=np.int32), np.ones(count, np.int64))


def _synthetic_items(count: int, size: DataSize, config: ConfigDict, seed: int) -> Items:
  """Returns items whose numbers of tokens and images are binomial with the means of the data set."""
  rng = np.random.default_rng(seed)
  longest = config.dataset.max_length
  share = (size.tokens - _SHORTEST) / (longest - _SHORTEST) if longest > _SHORTEST else 0.0
  tokens = _SHORTEST + rng.binomial(longest - _SHORTEST, share, count)
  images = rng.binomial(config.images, size.images / config.images if config.images else 0.0, count)
  return Items(*(Ragged.of_lengths(np.zeros(lengths.sum(), np.int32), lengths) for lengths in (tokens, images)))


def item_lengths(segments: np.ndarray) -> np.ndarray:
  """Returns the number of tokens of each item, images and phrases included.

  Args:
    segments: int32 [chunks, R, T], slots of packed rows.
  """
  rows = segments.reshape(-1, segments.shape[-1]).astype(np.int64)
  keys = np.arange(len(rows))[:, None] * (rows.shape[1] + 1) + rows
  return np.unique(keys[rows > 0], return_counts=True)[1]
