"""A workload on the chips of a machine: mesh, chunk size, and all arrays of a run as shapes with shardings."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.ahead_of_time.machine import Machine
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.ahead_of_time.workload import Workload
from vixml_jax.encoding.inputs import EncoderInputs
from vixml_jax.images.features import ImageFeatures, fits_devices
from vixml_jax.run import chosen
from vixml_jax.run.from_config import check_attention, check_divides, state_from_config
from vixml_jax.run.mesh_choice import choose_mesh
from vixml_jax.run.state import TrainState, abstract_params
from vixml_jax.training.optimizer import optimizer_from_config
from vixml_jax.training.step import DeviceBatch, device_batch
from vixml_jax.typing import Tree


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


def mesh_plan_of(config: ConfigDict, where: Machine) -> MeshPlan:
  """Returns the mesh and chunk size of a config; -1 stands for what the machine leaves, and 0 is chosen."""
  sizes = tuple(config.mesh[axis] for axis in sharding.MESH_AXES)
  if not config.mesh.fsdp:
    sizes = choose_mesh(config, len(where.devices), where.mesh, where.chip.hbm_bytes)
  mesh = where.mesh(*sizes)
  return MeshPlan(mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"], config.train.chunk_rows)


def workload_on(config: ConfigDict, size: DataSize, where: Machine) -> Workload:
  """Returns the workload of a config. A chunk that the config leaves open is chosen as in a run on the machine."""
  workload = Workload.of(config, size)
  if config.train.chunk_rows:
    return workload
  mesh_plan = mesh_plan_of(workload.config, where)
  row_devices = mesh_plan.data * mesh_plan.fsdp
  return Workload.of(config, size, row_devices, chosen.ACCELERATOR_SHARE * where.chip.hbm_bytes * row_devices)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A workload on the chips of a machine: the arrays of a run, as shapes with shardings.

  Attributes:
    workload: The workload.
    mesh_plan: Mesh and chunk size.
    mesh: Mesh of the machine's chips.
    state: Train state.
    frozen: Parameters that are not trained.
    batch: One batch.
    where: The machine.
  """

  workload: Workload
  mesh_plan: MeshPlan
  mesh: Mesh
  state: TrainState
  frozen: Tree
  batch: DeviceBatch
  where: Machine

  @classmethod
  def of(cls, workload: Workload, where: Machine, mesh_plan: MeshPlan) -> "Plan":
    """Returns a workload's plan for a machine.

    Raises:
      InputError: The mesh does not divide the batch, the chunks or a parameter.
    """
    workload = workload.with_chunk_rows(mesh_plan.chunk_rows)
    config, size, model = workload.config, workload.size, workload.model
    mesh = where.mesh(mesh_plan.data, mesh_plan.fsdp, mesh_plan.tensor)
    check_divides(config, mesh)
    check_attention(config, mesh)
    optimizer = optimizer_from_config(config, model, workload.steps)
    state = state_from_config(config, model, optimizer, size.train, size.labels, mesh)
    frozen = model.split(abstract_params(model, mesh))[1]
    features = _abstract_features(config, size, mesh, where.chip.hbm_bytes)
    # The batch itself is put on one device of this machine, which gives the shapes and shardings of its parts.
    host = sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    batch = _on_other_mesh(device_batch(workload.batch, features, host), mesh)
    return cls(workload, mesh_plan, mesh, state, frozen, batch, where)

  @property
  def train_arguments(self) -> tuple[TrainState, Tree, DeviceBatch]:
    """Arguments of the training step: state, frozen parameters, batch."""
    return self.state, self.frozen, self.batch

  @property
  def chunk(self) -> EncoderInputs:
    """One chunk of packed items."""
    return _first_chunk(self.batch.inputs)

  def rows(self, count: int, dtype: jax.typing.DTypeLike = np.float32) -> jax.ShapeDtypeStruct:
    """Returns embeddings of so many items, split by rows over the chips."""
    return self.array((sharding.padded_rows(count), self.workload.model.embed_dim), dtype, "query", "vector")

  def array(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *axes: str) -> jax.ShapeDtypeStruct:
    """Returns an array with these logical axes; without axes, every chip has all of it."""
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding.named_sharding(self.mesh, *axes))

  @property
  def filled(self) -> float:
    """Share of the batch's chunks that contain items; the empty ones, which fill up a power of two, are skipped."""
    return float(self.workload.batch.items.filled.mean())


def bytes_a_chip(tree: Any) -> float:
  """Returns the bytes that a tree of shapes with shardings takes on each chip."""
  return float(sum(map(sharding.bytes_a_device, jax.tree.leaves(tree))))


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


def halvings(chunk_rows: int) -> list[int]:
  """Returns a chunk size, its half, the half of that, and so on.

  >>> halvings(12)
  [12, 6, 3]
  """
  return [chunk_rows >> i for i in range(chunk_rows.bit_length()) if chunk_rows % (1 << i) == 0]


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
