"""Meshes, the table from logical axes to mesh axes, and the placement of arrays."""

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.errors import InputError


def test_axes_become_mesh_axes():
  assert sharding.spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, "fsdp", "tensor", None)
  assert sharding.spec(("query", "vector")) == PartitionSpec(("data", "fsdp"), None)
  assert sharding.spec(()) == PartitionSpec()


@pytest.mark.parametrize(
  "axes,message",
  [
    (("mlp", "heads"), "kernel: 'mlp' and 'heads' both map to mesh axis 'tensor'"),
    (("query", "embed"), "kernel: 'query' and 'embed' both map to mesh axis 'fsdp'"),
    (("embed", "color"), "kernel: no sharding rule for its logical axis 'color'"),
  ],
)
def test_axes_that_collide_or_have_no_rule_raise_an_error_with_their_names(axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.spec(axes, name="kernel")


class DeviceOfSlice:
  """A CPU device that says of which slice it is part, as those of TPU slices do."""

  def __init__(self, device, slice_index):
    self.device, self.slice_index = device, slice_index

  def __getattr__(self, name):
    return getattr(self.device, name)


def slices_of(mesh):
  return np.vectorize(lambda device: device.slice_index)(mesh.devices)


def devices_of_slices(*counts):
  indexes = [index for index, count in enumerate(counts) for _ in range(count)]
  return [DeviceOfSlice(device, index) for device, index in zip(jax.devices(), indexes, strict=True)]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1), (8, 1, 1), (2, 4, 1)])
def test_slices_are_divided_along_data_and_nothing_else(sizes):
  mesh = sharding.make_mesh(*sizes, devices=devices_of_slices(4, 4))
  assert mesh.devices.shape == sizes and mesh.axis_names == sharding.MESH_AXES
  found = slices_of(mesh)
  half = sizes[0] // 2
  assert (found[:half] == found[0, 0, 0]).all() and (found[half:] == 1 - found[0, 0, 0]).all()
  assert len({device.id for device in mesh.devices.flat}) == 8


def test_slices_that_data_cannot_divide_are_divided_along_fsdp_with_a_warning(caplog):
  found = slices_of(sharding.make_mesh(2, 4, 1, devices=devices_of_slices(2, 2, 2, 2)))
  assert [sorted(set(row)) for row in found[:, :, 0].tolist()] == [[0, 1], [2, 3]]
  (message,) = caplog.messages
  assert "mesh.data=2 is not a multiple of the 4 slices" in message and "mesh.data=4 is faster" in message


def test_slices_that_do_not_fit_the_mesh_are_refused():
  with pytest.raises(InputError, match="2 slices cannot be divided along data=1 and fsdp=1.*make mesh.data a multiple"):
    sharding.make_mesh(1, 1, 8, devices=devices_of_slices(4, 4))
  with pytest.raises(InputError, match="the devices of 2 slices cannot be divided"):
    sharding.make_mesh(8, 1, 1, devices=devices_of_slices(6, 2))


def shapes(**sizes):
  return {"encoder": {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in sizes.items()}}


def test_a_tree_of_shapes_is_sharded_over_the_mesh():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  found = sharding.tree_shardings(
    mesh,
    shapes(up=(4, 6, 10), bias=(4, 10)),
    {"encoder": {"up": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}},
  )
  assert found["encoder"]["up"].shard_shape((4, 6, 10)) == (4, 3, 5)
  assert found["encoder"]["bias"].shard_shape((4, 10)) == (4, 5)


def test_a_dimension_that_the_mesh_does_not_divide_raises_an_error_with_its_name():
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  with pytest.raises(InputError, match="encoder/up has embed=6, which is not divisible by fsdp = 4"):
    sharding.tree_shardings(mesh, shapes(up=(6, 10)), {"encoder": {"up": ("embed", "mlp")}})
  with pytest.raises(InputError, match="encoder/bank has query=12, which is not divisible by data x fsdp = 8"):
    sharding.tree_shardings(
      sharding.make_mesh(data=2, fsdp=4), shapes(bank=(12, 3)), {"encoder": {"bank": ("query", "vector")}}
    )


def test_key_value_heads_that_the_mesh_does_not_divide_are_replicated():
  axes = {"encoder": {"key": ("embed", "kv_heads", "head_dim"), "query": ("embed", "heads", "head_dim")}}
  sizes = shapes(key=(8, 2, 4), query=(8, 4, 4))
  found = sharding.tree_shardings(sharding.make_mesh(data=1, fsdp=2, tensor=4), sizes, axes)["encoder"]
  assert found["key"].spec == PartitionSpec("fsdp", None, None) and found["query"].shard_shape((8, 4, 4)) == (4, 1, 4)
  found = sharding.tree_shardings(sharding.make_mesh(data=2, fsdp=2, tensor=2), sizes, axes)["encoder"]
  assert found["key"].shard_shape((8, 2, 4)) == (4, 1, 4)
  with pytest.raises(InputError, match="encoder/query has heads=4, which is not divisible by tensor = 8"):
    sharding.tree_shardings(sharding.make_mesh(data=1, tensor=8), sizes, axes)


def test_a_gathered_parameter_is_sharded_over_tensor_only():
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)

  def gathered(x, axes):
    with sharding.use_mesh(mesh):
      return sharding.gather(x, *axes)

  for shape, axes, wanted in (
    ((8, 16), ("embed", "mlp"), (None, "tensor")),
    ((8, 2, 4), ("embed", "kv_heads", "head_dim"), (None, None, None)),  # Four devices cannot share two heads.
    ((8, 4, 4), ("embed", "kv_heads", "head_dim"), (None, "tensor", None)),
    ((6, 16), ("lora_alone", "mlp"), (None, "tensor")),
  ):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp")))
    found = jax.jit(gathered, static_argnums=1)(sharded, axes)
    assert found.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, PartitionSpec(*wanted)), x.ndim), axes
    np.testing.assert_array_equal(found, x)
  assert sharding.gather(x, "lora_alone", "mlp") is x  # Without a mesh.


@pytest.mark.parametrize("names", [("embed",), None, ("layers", "embed", "mlp")])
def test_a_leaf_without_one_axis_per_dimension_raises_an_error_with_its_name(names):
  with pytest.raises(ValueError, match="encoder/up: shape"):
    sharding.tree_shardings(sharding.make_mesh(), shapes(up=(6, 10)), {"encoder": {"up": names}})


@pytest.mark.parametrize(
  "sizes,shape",
  [
    (dict(), (8, 1, 1)),
    (dict(fsdp=4), (2, 4, 1)),
    (dict(data=1, tensor=-1), (1, 1, 8)),
    (dict(data=2, fsdp=2, tensor=2), (2, 2, 2)),
  ],
)
def test_a_mesh_uses_all_devices(sizes, shape):
  mesh = sharding.make_mesh(**sizes)
  assert mesh.axis_names == sharding.MESH_AXES and mesh.devices.shape == shape
  assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
  "sizes,message",
  [
    (dict(data=3), "3 x 1 x 1 does not equal the number of devices, 8"),
    (dict(fsdp=3), "2 x 3 x 1 does not equal the number of devices, 8"),
    (dict(fsdp=16), "1 x 16 x 1 does not equal the number of devices, 8"),
    (dict(data=-1, tensor=-1), "mesh.data and mesh.tensor are both -1"),
    (dict(tensor=0), "mesh.tensor=0: must be at least 1"),
    (dict(fsdp=-2), "mesh.fsdp=-2: must be at least 1"),
  ],
)
def test_an_impossible_mesh_raises_an_error_that_names_the_axis(sizes, message):
  with pytest.raises(InputError, match=message):
    sharding.make_mesh(**sizes)


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 294_805])
def test_padded_rows_are_divisible_by_every_power_of_two_up_to_1024(rows):
  padded = sharding.padded_rows(rows)
  assert rows <= padded < rows + 1024
  assert all(padded % 2**k == 0 for k in range(11))


def test_a_global_array_has_the_rows_of_the_host_and_is_read_back_whole():
  host = np.arange(48, dtype=np.float32).reshape(16, 3)
  mesh = sharding.make_mesh(data=4, fsdp=2)
  array = sharding.to_global(host, sharding.named_sharding(mesh, "query", "vector"))
  for shard in array.addressable_shards:
    assert shard.data.shape == (2, 3)
    np.testing.assert_array_equal(shard.data, host[shard.index])
  np.testing.assert_array_equal(sharding.to_host(array), host)
