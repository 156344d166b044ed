"""Mesh, the one table from logical axes to mesh axes, its coverage check, and host <-> global array helpers."""

import contextlib
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
import numpy as np

from vixml_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
_ROWS = ("data", "fsdp")
_ROW_MULTIPLE = 1024

# Logical axis -> mesh axes. Parameters and state name their axes beside their shapes; nothing else
# decides where an array lives.
RULES: dict[str, tuple[str, ...]] = {
  # Parameters.
  "layers": (),
  "vocab": (),  # Look-ups only, no output head: sharding `embed` is enough.
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
  "lora_alone": ("fsdp",),  # The rank of an adapter's matrix that has no `embed` to divide.
  "feature": (),
  # State and batches: many rows, whole vectors.
  "free_vector": _ROWS,
  "query": _ROWS,
  "label": _ROWS,
  "image": _ROWS,
  "row": _ROWS,
  "batch": _ROWS,
  "chunk": (),
  "vector": (),
}

# Axes that stay whole where the mesh does not divide them. Decoders share 2 to 8 heads of keys and values among all
# heads of the queries: with more devices than that, each has them all, at little cost.
WHOLE_IF_UNEVEN = frozenset({"kv_heads", "lora_alone"})


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A `data x fsdp x tensor` mesh over all devices; -1 (once) takes what the others leave.

  Raises:
    InputError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  unknown = [name for name, size in sizes.items() if size == -1]
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise InputError(f"mesh.{name}={size}: must be at least 1, or -1 for what the other axes leave")
  if len(unknown) > 1:
    raise InputError(f"mesh.{unknown[0]} and mesh.{unknown[1]} are both -1: give one of them")
  if unknown:
    rest = math.prod(size for size in sizes.values() if size != -1)
    sizes[unknown[0]] = max(len(devices) // rest, 1)
  if math.prod(sizes.values()) != len(devices):
    raise InputError(
      "mesh: data x fsdp x tensor = "
      + " x ".join(str(size) for size in sizes.values())
      + f" does not make {len(devices)} devices; change mesh.data, mesh.fsdp or mesh.tensor"
    )
  return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def row_devices(mesh: Mesh) -> int:
  """Returns the number of devices that share the rows of an array: `data` x `fsdp`."""
  return math.prod(mesh.shape[axis] for axis in _ROWS)


def spec(axes: tuple[str, ...], name: str = "array") -> PartitionSpec:
  """The PartitionSpec of logical `axes`.

  Raises:
    ValueError: if an axis has no rule, or two axes of the array want the same mesh axis.
  """
  used: dict[str, str] = {}
  entries = []
  for axis in axes:
    if axis not in RULES:
      raise ValueError(f"{name}: no sharding rule for its logical axis {axis!r}")
    for mesh_axis in RULES[axis]:
      if mesh_axis in used:
        raise ValueError(f"{name}: {used[mesh_axis]!r} and {axis!r} both map to mesh axis {mesh_axis!r}")
      used[mesh_axis] = axis
    entries.append(RULES[axis] or None)
  return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, *axes: str) -> NamedSharding:
  """Sharding of an array with these logical axes; no axes means replicated."""
  return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Returns the array constrained to its logical axes inside `use_mesh`; outside, the array unchanged.

  XLA carries shardings on from what it knows. Where parameters are divided over `fsdp` and activations are not pinned,
  it divides the activations' width, sums every product over the mesh and computes every row on every device; pinned by
  row, they make it gather each layer's parameters when it needs them.
  """
  return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec(axes))


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
  """Within it, also inside a traced function, `constrain` knows the mesh."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def tree_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
  """Shardings for a tree of shapes and the matching tree of logical-axis tuples.

  A dimension has to divide by the mesh axes that share it, unless its axis is one of `WHOLE_IF_UNEVEN`.

  Args:
    mesh: the mesh.
    shapes: nested dict of arrays or `jax.ShapeDtypeStruct`.
    axes: nested dict of the same keys with a tuple of logical axes at each leaf.

  Raises:
    ValueError: if a leaf has no axes, or as many as not its dimensions, or a rule fails.
    InputError: if a dimension does not divide by the mesh axes that share it.
  """

  def leaf(path, shape, names):
    name = "/".join(str(key.key) for key in path)
    if not isinstance(names, tuple) or len(names) != len(shape.shape):
      raise ValueError(f"{name}: shape {shape.shape} needs one logical axis a dimension, got {names!r}")
    partition = list(spec(names, name=name))
    for i, (size, axis) in enumerate(zip(shape.shape, names, strict=True)):
      parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in RULES[axis])
      if size % parts and axis in WHOLE_IF_UNEVEN:
        partition[i] = None
      elif size % parts:
        raise InputError(
          f"mesh: {name} has {axis}={size}, which does not divide by {' x '.join(RULES[axis])} = {parts}; "
          "change the mesh"
        )
    return NamedSharding(mesh, PartitionSpec(*partition))

  return jax.tree_util.tree_map_with_path(leaf, shapes, axes, is_leaf=lambda node: hasattr(node, "shape"))


def padded_rows(rows: int) -> int:
  """`rows` rounded up so that row-sharded state splits evenly.

  The multiple does not depend on the mesh, so that a checkpoint fits any number of devices that divides it.
  """
  return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def to_global(host: np.ndarray, sharding: Sharding) -> jax.Array:
  """A global array from host data that every process holds whole; each device gets its own part."""
  if sharding.is_fully_addressable:
    return jax.device_put(host, sharding)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
  """The whole array on every process."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))
