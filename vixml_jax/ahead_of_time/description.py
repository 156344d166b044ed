"""Describes a run without allocating it: every parameter with its place on a mesh, the state, and the initial values.

The mesh is abstract, so that its devices need not exist.
"""

from collections.abc import Iterator
import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from vixml_jax import sharding
from vixml_jax.ahead_of_time.initial_values import initial_values
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.input.batches import steps_per_epoch
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.run import chosen
from vixml_jax.run.from_config import model_from_config, state_from_config
from vixml_jax.run.mesh_choice import choose_mesh
from vixml_jax.run.provenance import read_starts
from vixml_jax.run.state import abstract_params
from vixml_jax.training.optimizer import optimizer_from_config, path_name
from vixml_jax.typing import Tree


@dataclasses.dataclass(frozen=True)
class DescribedArray:
  """An array of a run.

  Attributes:
    path: Name, such as `encoder/layers/up/kernel`.
    shape: Shape.
    dtype: Type of the elements.
    axes: Logical axis of each dimension; empty if they are not known.
    mesh_axes: For each dimension the mesh axes that share it, such as "fsdp" or "data x fsdp"; "" for none.
    bytes_a_device: Bytes on each device.
    trained: Whether training changes the array.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  axes: tuple[str, ...]
  mesh_axes: tuple[str, ...]
  bytes_a_device: int
  trained: bool

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Description:
  """A run as it starts.

  Attributes:
    config: The whole config, with what the data and the devices decide.
    mesh: Size of each mesh axis.
    size: Size of the data set.
    parameters: Parameters in the order of their paths.
    state: Bytes on each device of each part of the train state, besides the parameters.
    initial_values: What initializes the run, in order.
    provenance: The starts of the run so far (`provenance.read_starts`); empty for a new run.
  """

  config: ConfigDict
  mesh: dict[str, int]
  size: DataSize
  parameters: tuple[DescribedArray, ...]
  state: dict[str, int]
  initial_values: tuple[str, ...]
  provenance: tuple[dict[str, Any], ...]

  def count(self, trained: bool | None = None) -> int:
    """Returns the number of parameters; of the trained or the frozen ones if `trained` is given."""
    return sum(array.size for array in self.parameters if trained in (None, array.trained))

  def bytes_a_device(self) -> dict[str, int]:
    """Returns the bytes on each device of the parameters and of each part of the state."""
    parts = {"trained parameters": True, "frozen parameters": False}
    sums = {
      name: sum(array.bytes_a_device for array in self.parameters if array.trained == trained)
      for name, trained in parts.items()
    }
    return sums | self.state


def describe(
  config: ConfigDict, size: DataSize, devices: int | None = None, workdir: Path | None = None
) -> Description:
  """Returns the description of a run.

  Args:
    config: The whole config, checked by `configuration.check`.
    size: Size of the data set.
    devices: Number of devices; None for that of the config's mesh, or 1 if a size of it is left open.
    workdir: Folder of a run that continues from its newest checkpoint; None for a new run.

  Raises:
    InputError: The mesh does not fit the devices or the model, or the weights' package is not installed.
  """
  config = chosen.with_dtype(chosen.with_method(config), "cpu")  # Parameters have the same type on all platforms.
  config = chosen.with_free_vectors(config, size.labels)
  model = model_from_config(config)
  mesh = abstract_mesh(config, devices or _devices_of(config))
  steps = config.train.epochs * steps_per_epoch(size.train, config.train.batch_size)
  optimizer = optimizer_from_config(config, model, max(steps, 1))
  state = state_from_config(config, model, optimizer, size.train, size.labels, mesh)
  parts = {
    "optimizer state": state.opt_state,
    **({} if state.classifiers is None else {"classifiers of labels": state.classifiers}),
    "embedding bank": state.bank,
    "label centroids": state.centroids,
    "free vector of each label": state.label_clusters,
  }
  return Description(
    config,
    dict(mesh.shape),
    size,
    tuple(_parameters(model, abstract_params(model, mesh))),
    {name: sum(map(sharding.bytes_a_device, jax.tree.leaves(part))) for name, part in parts.items()},
    tuple(initial_values(config, model, size, workdir)),
    () if workdir is None else tuple(read_starts(workdir)),
  )


def abstract_mesh(config: ConfigDict, devices: int) -> Mesh:
  """Returns the mesh of a config on a number of devices, which need not exist.

  Raises:
    InputError: The sizes do not fit the number.
  """

  def make(data: int, fsdp: int, tensor: int) -> Mesh:
    sizes = sharding.mesh_sizes(data, fsdp, tensor, devices)
    # Shapes and shardings are made in the same way on both kinds of mesh.
    return cast(Mesh, AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3))

  if config.mesh.fsdp:
    return make(**config.mesh.to_dict())
  memory = sharding.device_memory(jax.local_devices()[:1])
  return make(*choose_mesh(config, devices, make, memory))


def _devices_of(config: ConfigDict) -> int:
  sizes = [config.mesh[axis] for axis in sharding.MESH_AXES]
  return math.prod(sizes) if min(sizes) > 0 else 1


def _parameters(model: ModelDefinition, params: Tree) -> Iterator[DescribedArray]:
  """Yields the parameters with their logical axes and their place on the mesh."""
  frozen = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.split(params)[1])}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    axes: Any = model.axes
    for part in path:
      axes = axes[part.key]
    name = path_name(path)
    spec = [*leaf.sharding.spec, *[None] * len(leaf.shape)][: len(leaf.shape)]
    shares = tuple(" x ".join([share] if isinstance(share, str) else share or ()) for share in spec)
    yield DescribedArray(
      name, leaf.shape, str(leaf.dtype), axes, shares, sharding.bytes_a_device(leaf), name not in frozen
    )
