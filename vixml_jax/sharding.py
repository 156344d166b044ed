"""Sharding of arrays over devices: the mesh, the table from logical axes to mesh axes, and host <-> global arrays.

The devices form a mesh with three axes. `data` and `fsdp` share the rows of batches and of large tables, `fsdp` also
shares parameters, and `tensor` shares matrix products. Several slices, which only a data center network connects, are
divided along `data`, so that only gradients cross it. Code never names these mesh axes. It names what each dimension
of an array is, its *logical axis*: a word embedding [vocabulary, D] is `("vocab", "embed")`. `RULES` below maps each
logical axis to mesh axes, and it is the only place that does. So `("vocab", "embed")` becomes `PartitionSpec(None,
"fsdp")`: every device holds all rows, and the devices along `fsdp` divide the columns. To shard a kind of dimension
differently, change its rule. To add a kind of dimension, add a rule. A dimension without a rule, and two dimensions of
an array that map to one mesh axis, are errors. The module is long because no other one names mesh axes.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import math
import os
from typing import Any, ParamSpec, TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
import numpy as np

from vixml_jax.device_slices import devices_over_slices
from vixml_jax.errors import InputError

_P = ParamSpec("_P")
_T = TypeVar("_T")


MESH_AXES = ("data", "fsdp", "tensor")
_ROWS = ("data", "fsdp")
_ROW_MULTIPLE = 1024

# Logical axis -> mesh axes.
RULES: dict[str, tuple[str, ...]] = {
  # Parameters.
  "layers": (),
  "vocab": (),  # The table is only looked up (there is no output head), so sharding `embed` is enough.
  "position": (),
  "token_type": (),
  "patch_height": (),
  "patch_width": (),
  "channel": (),
  "embed": ("fsdp",),
  "mlp": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "head_dim": (),
  "lora": (),
  "lora_alone": ("fsdp",),  # The rank of an adapter's matrix that has no dimension `embed`.
  "feature": (),
  # State and batches: rows are sharded, vectors are not.
  "free_vector": _ROWS,
  "query": _ROWS,
  "label": _ROWS,
  "image": _ROWS,
  "row": _ROWS,
  "batch": _ROWS,
  "chunk": (),
  "vector": (),
}

# Axes that are replicated if their size is not divisible by the mesh. Decoders have 2 to 8 heads of keys and values,
# which all heads of the queries share. With more devices than that, every device has all of them, at little cost.
WHOLE_IF_UNEVEN = frozenset({"kv_heads", "lora_alone"})


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a `data x fsdp x tensor` mesh.

  The devices of several TPU slices, or of several hosts with GPUs, are divided along `data` first: exchanges along
  `data` are gradients, once a step. What does not divide `data` is divided along `fsdp`.

  >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
  {'data': 1, 'fsdp': 1, 'tensor': 1}

  Args:
    data: Number of copies of the model; -1 for the number of devices divided by the other two sizes.
    fsdp: Number of devices that share the parameters; -1 as above.
    tensor: Number of devices that share each matrix product; -1 as above.
    devices: Devices of the mesh; None for all devices.

  Raises:
    InputError: If more than one size is -1, a size is below 1, the product is not the number of devices, or `tensor`
      would have to cross slices.
    NotImplementedError: If a mesh axis is not a product of axes of a TPU slice.
  """
  devices = jax.devices() if devices is None else devices
  sizes, types = mesh_sizes(data, fsdp, tensor, len(devices)), (AxisType.Auto,) * 3
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1:
    return Mesh(devices_over_slices(sizes, slices, devices), MESH_AXES, axis_types=types)
  return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)


def mesh_sizes(data: int, fsdp: int, tensor: int, count: int) -> tuple[int, int, int]:
  """Returns the sizes of the mesh that `make_mesh` would make of a number of devices, which need not exist.

  Raises:
    InputError: As `make_mesh`.
  """
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  unknown = [name for name, size in sizes.items() if size == -1]
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise InputError(f"mesh.{name}={size}: must be at least 1, or -1 to use the remaining devices")
  if len(unknown) > 1:
    raise InputError(f"mesh.{unknown[0]} and mesh.{unknown[1]} are both -1; set one of them")
  if unknown:
    rest = math.prod(size for size in sizes.values() if size != -1)
    sizes[unknown[0]] = max(count // rest, 1)
  if math.prod(sizes.values()) != count:
    raise InputError(
      "mesh: data x fsdp x tensor = "
      + " x ".join(str(size) for size in sizes.values())
      + f" does not equal the number of devices, {count}; change mesh.data, mesh.fsdp or mesh.tensor"
    )
  return sizes["data"], sizes["fsdp"], sizes["tensor"]


def row_axes() -> tuple[str, ...]:
  """Returns the mesh axes that share the rows of an array."""
  return _ROWS


def row_devices(mesh: Mesh) -> int:
  """Returns the number of devices that share the rows of an array: `data` x `fsdp`."""
  return math.prod(mesh.shape[axis] for axis in _ROWS)


def spec(axes: tuple[str, ...], name: str = "array") -> PartitionSpec:
  """Returns the PartitionSpec of an array with these logical axes.

  >>> tuple(spec(("vocab", "embed")))
  (None, 'fsdp')
  >>> tuple(spec(("query", "vector")))
  (('data', 'fsdp'), None)

  Args:
    axes: One logical axis per dimension.
    name: Name of the array, for messages.

  Raises:
    ValueError: If an axis has no rule, or two axes of the array map to the same mesh axis.
  """
  used: dict[str, str] = {}
  entries = []
  for axis in axes:
    if axis not in RULES:
      raise ValueError(f"{name}: no sharding rule for its logical axis {axis!r}; add one to sharding.RULES")
    for mesh_axis in RULES[axis]:
      if mesh_axis in used:
        raise ValueError(f"{name}: {used[mesh_axis]!r} and {axis!r} both map to mesh axis {mesh_axis!r}")
      used[mesh_axis] = axis
    entries.append(RULES[axis] or None)
  return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, *axes: str) -> NamedSharding:
  """Returns the sharding of an array with these logical axes; without axes, the array is replicated."""
  return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Constrains an array to the sharding of its logical axes within `use_mesh`; does nothing without a mesh.

  XLA propagates shardings. If parameters are sharded over `fsdp` and activations are not constrained, it shards the
  width of the activations, sums every product over the mesh and computes every row on every device. With activations
  constrained by row, it gathers the parameters of each layer when they are needed.
  """
  return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec(axes))


def gather(x: jax.Array, *axes: str) -> jax.Array:
  """Gathers a parameter that the devices along `fsdp` share; does nothing without a mesh, as `constrain`.

  Dimensions that the devices along `tensor` share stay sharded. If parameters are not gathered, XLA may pass the shards
  around in a ring, multiply each of them as it arrives, and add the partial products. Each device then reads and writes
  the whole result as often as there are shards.

  Args:
    x: The parameter.
    axes: Its logical axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  sharers = (_sharers(mesh, size, axis) for size, axis in zip(x.shape, axes, strict=True))
  kept = (tuple(mesh_axis for mesh_axis in mesh_axes if mesh_axis != "fsdp") for mesh_axes in sharers)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*(mesh_axes or None for mesh_axes in kept)))


def platform() -> str:
  """Returns the platform of the devices of `use_mesh`, such as "tpu"; without a mesh, JAX's default platform.

  Programs that are compiled for absent devices have the platform of these devices.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def platform_of(mesh: Mesh) -> str:
  """Returns the platform of the devices of a mesh: "cpu", "gpu" or "tpu"."""
  return str(mesh.devices.flat[0].platform)


def sharers(axis: str) -> int:
  """Returns the number of devices that share a dimension with this logical axis within `use_mesh`, else 1."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[mesh_axis] for mesh_axis in RULES[axis])


def on_each_device(
  function: Callable[..., jax.Array], arguments: Sequence[tuple[str, ...]], result: tuple[str, ...]
) -> Callable[..., jax.Array]:
  """Returns a function that runs on each device's part of its arguments within `use_mesh`; without a mesh, `function`.

  Args:
    function: Function of one array per argument. It must not need what other devices have.
    arguments: Logical axes of each argument.
    result: Logical axes of the result.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return function
  # Pallas kernels do not tell over which mesh axes their results vary.
  return jax.shard_map(function, in_specs=tuple(map(spec, arguments)), out_specs=spec(result), check_vma=False)


def _sharers(mesh: Mesh | AbstractMesh, size: int, axis: str) -> tuple[str, ...]:
  """Returns the mesh axes that share a dimension: those of its rule, or none if it is `WHOLE_IF_UNEVEN` and uneven."""
  uneven = size % math.prod(mesh.shape[mesh_axis] for mesh_axis in RULES[axis])
  return () if uneven and axis in WHOLE_IF_UNEVEN else RULES[axis]


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
  """Returns a context manager in which `constrain` uses this mesh, also inside a traced function."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def in_current_mesh(function: Callable[_P, _T]) -> Callable[_P, _T]:
  """Returns the function so that it runs in the mesh of the `use_mesh` around this call, wherever it is called.

  JAX traces the backward pass of a custom derivative after the block of `use_mesh` has ended.
  """
  mesh = jax.sharding.get_abstract_mesh()

  @functools.wraps(function)
  def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    with jax.sharding.use_abstract_mesh(mesh):
      return function(*args, **kwargs)

  return run


def tree_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
  """Returns the shardings of a tree of arrays.

  The size of a dimension must be divisible by the mesh axes that share it, unless its axis is in `WHOLE_IF_UNEVEN`.

  Args:
    mesh: The mesh.
    shapes: Nested dict of arrays or `jax.ShapeDtypeStruct`.
    axes: Nested dict with the same keys and a tuple of logical axes at each leaf.

  Raises:
    ValueError: If a leaf does not have one logical axis per dimension, or as in `spec`.
    InputError: If the size of a dimension is not divisible by the mesh axes that share it.
  """

  def leaf(path: tuple[Any, ...], shape: Any, names: Any) -> NamedSharding:
    name = "/".join(str(key.key) for key in path)
    if not isinstance(names, tuple) or len(names) != len(shape.shape):
      raise ValueError(f"{name}: shape {shape.shape} needs one logical axis per dimension, got {names!r}")
    partition = list(spec(names, name=name))
    for i, (size, axis) in enumerate(zip(shape.shape, names, strict=True)):
      mesh_axes = _sharers(mesh, size, axis)
      partition[i] = mesh_axes or None
      parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
      if size % parts:
        raise InputError(
          f"mesh: {name} has {axis}={size}, which is not divisible by {' x '.join(RULES[axis])} = {parts}; "
          "change the mesh"
        )
    return NamedSharding(mesh, PartitionSpec(*partition))

  return jax.tree_util.tree_map_with_path(leaf, shapes, axes, is_leaf=lambda node: hasattr(node, "shape"))


def bytes_a_device(array: jax.Array | jax.ShapeDtypeStruct) -> int:
  """Returns the bytes that an array, or a shape with a sharding, takes on each device."""
  assert array.sharding is not None
  return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def device_memory(devices: Sequence[jax.Device]) -> int:
  """Returns the bytes that each of a process's devices grants; for CPU devices, a share of the machine's memory."""
  stats = devices[0].memory_stats() or {}
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return stats.get("bytes_limit", whole // len(devices))


def padded_rows(rows: int) -> int:
  """Returns `rows` rounded up to a multiple of 1024, so that row-sharded state can be divided evenly.

  The multiple does not depend on the mesh. So a checkpoint can be restored on any mesh whose `data x fsdp` divides it.

  >>> padded_rows(294_805)
  294912
  """
  return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def to_global(host: np.ndarray, sharding: Sharding) -> jax.Array:
  """Returns a global array of host data that every process holds whole; each device gets its shard."""
  if sharding.is_fully_addressable:
    return jax.device_put(host, sharding)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def as_argument(host: np.ndarray, sharding: Sharding) -> Any:
  """Returns host data as an argument of a jitted program.

  It is a global array, or with one device the host array itself, which jit copies in a tenth of the time that
  `to_global` takes for a small array. A transfer guard does not permit the latter.
  """
  return host if len(sharding.device_set) == 1 else to_global(host, sharding)


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
  """Returns the whole array on the host of every process. All processes must call this together."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait_for_all_processes(what: str) -> None:
  """Waits until every process of the run has called this with the same `what`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
