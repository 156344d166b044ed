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
from vixml_jax.encoding.inputs import EncoderInputs
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.images.features import ImageFeatures, fits_devices
from vixml_jax.input.batches import Batch, TrainingQueries, make_batch, steps_per_epoch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.ragged import Ragged
from vixml_jax.run.from_config import check_divides, layout_from_config, model_from_config, with_free_vectors
from vixml_jax.run.state import TrainState, abstract_params, abstract_state
from vixml_jax.training.optimizer import optimizer_from_config
from vixml_jax.training.step import DeviceBatch, device_batch, make_train_step, step_config
from vixml_jax.typing import Tree

_SHORTEST = 3  # Tokens of the shortest synthetic text: two special tokens and one of its own.


@dataclasses.dataclass(frozen=True)
class MeshPlan:
  """A mesh and a chunk size: what may change where a config does not fit.

  Attributes:
    data: Number of copies of the model, which share a batch.
    fsdp: Number of chips that share the parameters, and a batch as well.
    tensor: Number of chips that share each matrix product.
    chunk_rows: Packed rows that are encoded at a time, over all chips.
  """

  data: int
  fsdp: int
  tensor: int
  chunk_rows: int

  def __str__(self) -> str:
    return f"mesh {self.data} x {self.fsdp} x {self.tensor} (data x fsdp x tensor), chunks of {self.chunk_rows} rows"

  @property
  def flags(self) -> str:
    """The flags that select this mesh and chunk size."""
    return (
      f"--config.mesh.data={self.data} --config.mesh.fsdp={self.fsdp} --config.mesh.tensor={self.tensor} "
      f"--config.train.chunk_rows={self.chunk_rows}"
    )


def mesh_plan_of(config: ConfigDict, where: Slice) -> MeshPlan:
  """Returns the mesh and chunk size of a config; a size of -1 is replaced by what the slice leaves."""
  mesh = where.mesh(**config.mesh.to_dict())
  return MeshPlan(mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"], config.train.chunk_rows)


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
  def of(cls, config: ConfigDict, size: DataSize) -> "Workload":
    """Returns the workload of a config, with the choices that depend on the size."""
    config = with_free_vectors(config, size.labels)
    return cls(config, size, model_from_config(config))

  @property
  def steps(self) -> int:
    """Steps of the whole run."""
    return self.config.train.epochs * steps_per_epoch(self.size.train, self.config.train.batch_size)

  def with_chunk_rows(self, rows: int) -> "Workload":
    """Returns the same workload with another chunk size."""
    if rows == self.config.train.chunk_rows:
      return self
    config = self.config.copy_and_resolve_references()
    config.train.chunk_rows = rows
    return dataclasses.replace(self, config=config)

  @functools.cached_property
  def batch(self) -> Batch:
    """A batch of synthetic items with the lengths of the data set, packed as in training."""
    size, train = self.size, self.config.train
    queries, labels = (_synthetic_items(train.batch_size, size, self.config, seed) for seed in range(2))
    own = Ragged.of_lengths(np.arange(train.batch_size, dtype=np.int32), np.ones(train.batch_size, np.int64))
    dropout = self.config.fusion.modality_dropout if self.config.images else 0.0
    data = TrainingQueries(queries, own, labels, np.ones(train.batch_size), dropout)
    return make_batch(data, np.arange(train.batch_size), train.batch_size, self.layout, seed=0, epoch=0, step=0)

  @property
  def layout(self) -> PackedLayout:
    """Shape of the packed rows."""
    return layout_from_config(self.config, _SyntheticTokenizer(self.config.encoder.architecture))


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


def _synthetic_items(count: int, size: DataSize, config: ConfigDict, seed: int) -> Items:
  """Returns items whose numbers of tokens and images are binomial with the means of the data set."""
  rng = np.random.default_rng(seed)
  longest = config.dataset.max_length
  share = (size.tokens - _SHORTEST) / (longest - _SHORTEST) if longest > _SHORTEST else 0.0
  tokens = _SHORTEST + rng.binomial(longest - _SHORTEST, share, count)
  images = rng.binomial(config.images, size.images / config.images if config.images else 0.0, count)
  return Items(*(Ragged.of_lengths(np.zeros(lengths.sum(), np.int32), lengths) for lengths in (tokens, images)))


@dataclasses.dataclass(frozen=True)
class Plan:
  """A workload on the chips of a slice: all arguments of its programs, as shapes with shardings.

  Attributes:
    workload: The workload.
    mesh_plan: Mesh and chunk size.
    mesh: Mesh of the slice's chips.
    state: Train state.
    frozen: Parameters that are not trained.
    batch: One batch.
  """

  workload: Workload
  mesh_plan: MeshPlan
  mesh: Mesh
  state: TrainState
  frozen: Tree
  batch: DeviceBatch

  @classmethod
  def of(cls, workload: Workload, where: Slice, mesh_plan: MeshPlan) -> "Plan":
    """Returns a workload's plan for a slice.

    Raises:
      InputError: The mesh does not divide the batch, the chunks or a parameter.
    """
    workload = workload.with_chunk_rows(mesh_plan.chunk_rows)
    config, size, model = workload.config, workload.size, workload.model
    mesh = where.mesh(mesh_plan.data, mesh_plan.fsdp, mesh_plan.tensor)
    check_divides(config, mesh)
    optimizer = optimizer_from_config(config, model, workload.steps)
    state = abstract_state(model, optimizer, size.train, size.labels, config.train.bank_dtype, mesh)
    frozen = model.split(abstract_params(model, mesh))[1]
    features = _abstract_features(config, size, mesh, where.chip.hbm_bytes)
    # The batch itself is put on one device of this machine, which gives the shapes and shardings of its parts.
    host = sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    batch = _on_other_mesh(device_batch(workload.batch, features, host), mesh)
    return cls(workload, mesh_plan, mesh, state, frozen, batch)

  def lower_train(self) -> jax.stages.Lowered:
    """Lowers the training step."""
    config, model = self.workload.config, self.workload.model
    how = step_config(config, model, self.workload.layout, self.workload.steps)
    return make_train_step(how, self.state, self.mesh).lower(*self.train_arguments)

  def lower_encode(self) -> jax.stages.Lowered:
    """Lowers the step that embeds one chunk of items."""
    encoder = ItemEncoder(self.workload.model, self.workload.layout, self.mesh)
    return encoder.pool_program.lower(*self.encode_arguments)

  @property
  def train_arguments(self) -> tuple[TrainState, Tree, DeviceBatch]:
    """Arguments of the training step: state, frozen parameters, batch."""
    return self.state, self.frozen, self.batch

  @property
  def encode_arguments(self) -> tuple[Tree, Tree, EncoderInputs, Any]:
    """Arguments of the encoding step: trained and frozen parameters, one chunk, image features on the devices."""
    return self.state.params, self.frozen, _first_chunk(self.batch.inputs), self.batch.image_features

  @property
  def filled(self) -> float:
    """Share of the batch's chunks that contain items; the empty ones, which fill up a power of two, are skipped."""
    return float((self.workload.batch.items.segments > 0).any(axis=(1, 2)).mean())


def bytes_a_chip(tree: Any) -> float:
  """Returns the bytes that a tree of shapes with shardings takes on each chip."""
  return float(
    sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  )


def _abstract_features(config: ConfigDict, size: DataSize, mesh: Mesh, memory: float) -> ImageFeatures | None:
  """Returns image features without values, on the chips where training would put them there."""
  if not config.images:
    return None
  num_images, dim = max(size.num_images, 1), config.features.dim
  values = np.broadcast_to(np.zeros((), np.float16), (num_images, dim))
  on_devices: Any = None
  if config.fusion.bank == "device" or (config.fusion.bank == "auto" and fits_devices(num_images, dim, mesh, memory)):
    on_devices = jax.ShapeDtypeStruct(
      (sharding.padded_rows(num_images), dim), np.float16, sharding=sharding.named_sharding(mesh, "image", "vector")
    )
  return ImageFeatures(values, on_devices)


def _on_other_mesh(tree: Any, mesh: Mesh) -> Any:
  """Returns arrays as shapes on another mesh, sharded by the same axes; shapes are returned unchanged."""

  def move(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec))

  return jax.tree.map(move, tree)


def _first_chunk(tree: Any) -> Any:
  """Returns the shapes of one chunk of arrays [chunks, ...]."""

  def first(leaf: Any) -> jax.ShapeDtypeStruct:
    where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)

  return jax.tree.map(first, tree)


def item_lengths(segments: np.ndarray) -> np.ndarray:
  """Returns the number of tokens of each item, images and phrases included.

  Args:
    segments: int32 [chunks, R, T], slots of packed rows.
  """
  rows = segments.reshape(-1, segments.shape[-1]).astype(np.int64)
  keys = np.arange(len(rows))[:, None] * (rows.shape[1] + 1) + rows
  return np.unique(keys[rows > 0], return_counts=True)[1]


def all_mesh_plans(chips: int, chunk_rows: Sequence[int]) -> list[MeshPlan]:
  """Returns every mesh of so many chips with each of the chunk sizes that it divides."""
  sizes = [size for size in range(1, chips + 1) if chips % size == 0]
  return [
    MeshPlan(chips // (fsdp * tensor), fsdp, tensor, rows)
    for tensor in sizes
    for fsdp in sizes
    if chips % (fsdp * tensor) == 0
    for rows in chunk_rows
    if rows % (chips // tensor) == 0
  ]
