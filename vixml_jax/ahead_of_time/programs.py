"""The programs of a config, training step and encoding step, lowered for devices that need not exist."""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.ahead_of_time.chips import Slice
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.errors import InputError
from vixml_jax.images import features
from vixml_jax.images.features import ImageFeatures
from vixml_jax.input.batches import Batch, TrainingQueries, make_batch, steps_per_epoch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.losses import LossConfig
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.ragged import Ragged
from vixml_jax.run.from_config import layout_of, model_of, optimizer_of, settle_free_vectors
from vixml_jax.run.state import TrainState, abstract_params, abstract_state
from vixml_jax.training.step import device_batch, make_train_step
from vixml_jax.typing import Tree

_SHORTEST = 3  # Tokens of the shortest text that is drawn: two special ones and one of its own.


@dataclasses.dataclass(frozen=True)
class Spread:
  """How a run is spread over chips, which is what may change where it does not fit.

  Attributes:
    data: copies of the model that share a batch.
    fsdp: chips that share parameters, and a batch besides.
    tensor: chips that share each matrix product.
    chunk_rows: packed rows that are encoded at a time, over all chips.
  """

  data: int
  fsdp: int
  tensor: int
  chunk_rows: int

  def __str__(self) -> str:
    return f"mesh {self.data} x {self.fsdp} x {self.tensor} (data x fsdp x tensor), chunks of {self.chunk_rows} rows"

  @property
  def flags(self) -> str:
    """The flags that ask for it."""
    return (
      f"--config.mesh.data={self.data} --config.mesh.fsdp={self.fsdp} --config.mesh.tensor={self.tensor} "
      f"--config.train.chunk_rows={self.chunk_rows}"
    )


def spread_asked_for(config: ConfigDict, where: Slice) -> Spread:
  """What the config says, with the size that it leaves open."""
  mesh = where.mesh(**config.mesh.to_dict())
  return Spread(mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"], config.train.chunk_rows)


@dataclasses.dataclass(frozen=True)
class Workload:
  """A config on a data set of some size, without values and without devices.

  Attributes:
    config: the whole config.
    size: of the data set.
    model: the model's definition.
  """

  config: ConfigDict
  size: DataSize
  model: ModelDefinition

  @classmethod
  def of(cls, config: ConfigDict, size: DataSize) -> "Workload":
    """Settles what depends on the size."""
    config = settle_free_vectors(config, size.labels)
    return cls(config, size, model_of(config))

  @property
  def steps(self) -> int:
    """Steps of the whole run."""
    return self.config.train.epochs * steps_per_epoch(self.size.train, self.config.train.batch_size)

  def with_chunk_rows(self, rows: int) -> "Workload":
    """The same with chunks of so many rows."""
    if rows == self.config.train.chunk_rows:
      return self
    config = self.config.copy_and_resolve_references()
    config.train.chunk_rows = rows
    return dataclasses.replace(self, config=config)

  @functools.cached_property
  def batch(self) -> Batch:
    """A batch of made-up items with the lengths of the data set, packed as in training."""
    size, train = self.size, self.config.train
    queries, labels = (_items(train.batch_size, size, self.config, seed) for seed in range(2))
    own = Ragged.of_lengths(np.arange(train.batch_size, dtype=np.int32), np.ones(train.batch_size, np.int64))
    dropout = self.config.fusion.modality_dropout if self.config.images else 0.0
    data = TrainingQueries(queries, own, labels, np.ones(train.batch_size), dropout)
    return make_batch(data, np.arange(train.batch_size), train.batch_size, self.layout, seed=0, epoch=0, step=0)

  @property
  def layout(self) -> PackedLayout:
    """The shape of the packed rows."""
    return layout_of(self.config, _MadeUpTokenizer(self.config.encoder.architecture))


class _MadeUpTokenizer(Tokenizer):
  """Stands in for the encoder's own, which lies with its weights: a token a word, and special ones as BERT or Qwen."""

  def __init__(self, architecture: str):
    self.special_tokens = 2 if architecture == "bert" else 0

  def uncut(self, text: str) -> tuple[int, ...]:
    """As many ids as there are words and special tokens."""
    return (0,) * (len(text.split()) + self.special_tokens)

  def token_id(self, token: str) -> int:
    """Every token is there."""
    return 0


def _items(count: int, size: DataSize, config: ConfigDict, seed: int) -> Items:
  """Items whose numbers of tokens and images are binomial with the means of the data set."""
  rng = np.random.default_rng(seed)
  longest = config.dataset.max_length
  share = (size.tokens - _SHORTEST) / (longest - _SHORTEST) if longest > _SHORTEST else 0.0
  tokens = _SHORTEST + rng.binomial(longest - _SHORTEST, share, count)
  images = rng.binomial(config.images, size.images / config.images if config.images else 0.0, count)
  return Items(*(Ragged.of_lengths(np.zeros(lengths.sum(), np.int32), lengths) for lengths in (tokens, images)))


@dataclasses.dataclass(frozen=True)
class Plan:
  """A workload spread over the chips of a slice: all arguments of its programs, as shapes with shardings."""

  workload: Workload
  spread: Spread
  mesh: Mesh
  state: TrainState
  frozen: Tree
  batch: dict[str, Any]

  @classmethod
  def of(cls, workload: Workload, where: Slice, spread: Spread) -> "Plan":
    """Spreads a workload.

    Raises:
      InputError: if something does not divide as the spread asks.
    """
    workload = workload.with_chunk_rows(spread.chunk_rows)
    config, size, model = workload.config, workload.size, workload.model
    rows = spread.data * spread.fsdp
    for key in ("batch_size", "chunk_rows"):
      if config.train[key] % rows:
        raise InputError(f"train.{key}={config.train[key]}: must divide by mesh.data x mesh.fsdp = {rows}")
    mesh = where.mesh(spread.data, spread.fsdp, spread.tensor)
    optimizer = optimizer_of(config, model, workload.steps)
    state = abstract_state(model, optimizer, size.train, size.labels, config.train.bank_dtype, mesh)
    frozen = model.split(abstract_params(model, mesh))[1]
    bank = _feature_bank(config, size, mesh, where.chip.hbm_bytes)
    # The batch itself is laid on a device of this machine: that tells shapes and shardings of all that it is made of.
    host = sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    return cls(workload, spread, mesh, state, frozen, _moved(device_batch(workload.batch, host, bank), mesh))

  def lower_train(self) -> jax.stages.Lowered:
    """The training step."""
    config, model = self.workload.config, self.workload.model
    step = make_train_step(
      self.state,
      model=model,
      optimizer=optimizer_of(config, model, self.workload.steps),
      layout=self.workload.layout,
      loss_config=LossConfig(**config.loss.to_dict()),
      base_key=jax.random.key(config.seed, impl=config.train.rng_impl),
      remat=config.train.remat,
      mesh=self.mesh,
    )
    return step.lower(*self.train_arguments)

  def lower_encode(self) -> jax.stages.Lowered:
    """The step that embeds one chunk of items."""
    encoder = ItemEncoder(self.workload.model, self.workload.layout, self.mesh)
    return encoder._pool.lower(*self.encode_arguments)

  @property
  def train_arguments(self) -> tuple:
    """What a training step is given: state, frozen parameters, batch."""
    return self.state, self.frozen, self.batch

  @property
  def encode_arguments(self) -> tuple:
    """What an encoding step is given: trained and frozen parameters, one chunk, the bank of image features."""
    chunk = (_first(self.batch[name]) for name in ("tokens", "segments", "positions", "images"))
    return self.state.params, self.frozen, *chunk, self.batch["image_bank"]

  @property
  def filled(self) -> float:
    """Share of the batch's chunks that hold anything; the others, which fill up a bucket, are skipped."""
    return float((self.workload.batch.items.segments > 0).any(axis=(1, 2)).mean())


def bytes_a_chip(tree: Any) -> float:
  """What a tree of shapes with shardings takes on each chip."""
  return float(
    sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  )


def _feature_bank(config: ConfigDict, size: DataSize, mesh: Mesh, memory: float) -> ImageFeatures | None:
  """A bank without values: on the chips where training would put it there."""
  if not config.images:
    return None
  vectors, dim = max(size.num_images, 1), config.features.dim
  values = np.broadcast_to(np.zeros((), np.float16), (vectors, dim))
  needed = features.bytes_per_device(vectors, dim, mesh.shape["data"] * mesh.shape["fsdp"])
  fits = needed <= features._SHARE * memory
  on_devices: Any = None
  if config.fusion.bank == "device" or (config.fusion.bank == "auto" and fits):
    on_devices = jax.ShapeDtypeStruct(
      (sharding.padded_rows(vectors), dim), np.float16, sharding=sharding.named_sharding(mesh, "image", "vector")
    )
  return ImageFeatures(values, {}, "", on_devices)


def _moved(tree: Any, mesh: Mesh) -> Any:
  """Arrays as shapes, spread over another mesh in the same way; shapes as they are."""

  def move(leaf):
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec))

  return jax.tree.map(move, tree)


def _first(tree: Any) -> Any:
  """Of arrays [chunks, ...] the shape of one chunk."""

  def first(leaf):
    where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)

  return jax.tree.map(first, tree)


def item_lengths(segments: np.ndarray) -> np.ndarray:
  """Tokens of each item of packed rows, [chunks, R, T] slots, images and phrases included."""
  rows = segments.reshape(-1, segments.shape[-1]).astype(np.int64)
  keys = np.arange(len(rows))[:, None] * (rows.shape[1] + 1) + rows
  return np.unique(keys[rows > 0], return_counts=True)[1]


def all_spreads(chips: int, chunk_rows: Sequence[int]) -> list[Spread]:
  """Every mesh of so many chips with each of these chunk sizes, if a chunk divides over it."""
  sizes = [size for size in range(1, chips + 1) if chips % size == 0]
  return [
    Spread(chips // (fsdp * tensor), fsdp, tensor, rows)
    for tensor in sizes
    for fsdp in sizes
    if chips % (fsdp * tensor) == 0
    for rows in chunk_rows
    if rows % (chips // tensor) == 0
  ]
