"""Checkpoints read into sharded arrays: values, the windows that are read, memory and traffic."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers import tiny_decoders, tiny_encoders, weight_files
from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.models import quantized
from vixml_jax.models.lora import split_lora
from vixml_jax.weights import engine, hf_config, hf_folder, placement, tables

MESHES = [dict(data=8), dict(data=1, fsdp=8), dict(data=2, tensor=4), dict(data=2, fsdp=2, tensor=2)]


class Recorded(hf_folder.SafetensorsFolder):
  """A folder that records which windows of its tensors are read."""

  def __init__(self, folder):
    super().__init__(folder)
    self.windows = []

  def read(self, name):
    raise AssertionError(f"{name} is read whole")

  def read_window(self, name, window):
    self.windows.append((name, tuple((cut.start, cut.stop) for cut in window)))
    return super().read_window(name, window)


def _shardings(folder, shapes, **mesh):
  axes = tiny_encoders.our_shapes(folder)[2]
  return sharding.tree_shardings(sharding.make_mesh(**mesh), shapes, axes)


@pytest.mark.parametrize(
  "mesh,dtype", [*((mesh, np.float32) for mesh in MESHES), (MESHES[-1], ml_dtypes.bfloat16)], ids=str
)
def test_sharded_arrays_equal_those_on_the_host(bert, tmp_path, mesh, dtype):
  folder, tensors, shapes = bert
  stored = {name: value.astype(dtype) for name, value in tensors.items()}
  place_of = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(stored))}
  (folder / "model.safetensors").unlink()
  for file in set(place_of.values()):
    save_file({name: value for name, value in stored.items() if place_of[name] == file}, folder / file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place_of}))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
  where = _shardings(folder, shapes, **mesh)
  found = placement.place(tables.BERT, hf_folder.SafetensorsFolder(folder), shapes, where)
  assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding == sharding, found, where))
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
  weight_files.assert_equal(jax.tree.map(sharding.to_host, found), weight_files.load(folder, shapes))
  # The query matrix of the last layer by hand, in case both ways of loading share a mistake.
  name = f"encoder.layer.{tiny_encoders.LAYERS - 1}.attention.self.query.weight"
  heads = stored[name].T.reshape(tiny_encoders.DIM, tiny_encoders.HEADS, -1)
  np.testing.assert_array_equal(found["layers"]["attention"]["query"]["kernel"][-1], heads)


@pytest.mark.parametrize("dtype", quantized.LARGEST)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_kernels_are_quantized_while_they_are_read(tmp_path, mesh, dtype):
  tiny_decoders.hf_decoder("qwen2").save_pretrained(tmp_path)
  arguments = hf_config.encoder_arguments(tmp_path) | dict(lora_rank=8, lora_alpha=8.0)
  plain = split_lora(tiny_decoders.abstract(**arguments)[1])[0]
  shapes, axes = (split_lora(tree)[0] for tree in tiny_decoders.abstract(**arguments, base_dtype=dtype)[1:])
  recorded = Recorded(tmp_path)
  where = sharding.tree_shardings(sharding.make_mesh(**mesh), shapes, axes)
  found = placement.place(tables.QWEN2, recorded, shapes, where)
  assert jax.tree.all(
    jax.tree.map(lambda x, shape, at: x.sharding == at and x.dtype == shape.dtype, found, shapes, where)
  )
  assert len(recorded.windows) == len(set(recorded.windows))
  found = engine.flatten_tree(jax.tree.map(sharding.to_host, found))
  exact = engine.flatten_tree(hf_folder.load_pretrained(tmp_path, tables.QWEN2, plain))
  quantize = jax.jit(quantized.quantize_kernel, static_argnums=(1, 2))  # XLA divides otherwise within a program.
  for name, value in exact.items():
    if f"{name}_scale" not in found:
      np.testing.assert_array_equal(found[name], value, err_msg=name)
      continue
    inputs = value.ndim - found[f"{name}_scale"].ndim
    for layer, kernel in enumerate(value):
      values, scale = quantize(jnp.asarray(kernel), inputs, dtype)
      np.testing.assert_array_equal(found[name][layer], values, err_msg=name)
      np.testing.assert_array_equal(found[f"{name}_scale"][layer], scale, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_byte_is_read_once(bert, mesh):
  folder, tensors, shapes = bert
  recorded = Recorded(folder)
  placement.place(tables.BERT, recorded, shapes, _shardings(folder, shapes, **mesh))
  assert len(recorded.windows) == len(set(recorded.windows))
  read = dict.fromkeys(tensors, 0)
  for name, window in recorded.windows:
    read[name] += np.prod([stop - start for start, stop in window])
  assert read == {name: value.size for name, value in tensors.items()}


def test_each_device_of_a_sharded_mesh_gets_its_own_window(bert):
  folder, _, shapes = bert
  recorded = Recorded(folder)
  placement.place(tables.BERT, recorded, shapes, _shardings(folder, shapes, data=2, fsdp=2, tensor=2))
  windows = [window for name, window in recorded.windows if name == "encoder.layer.1.attention.self.query.weight"]
  # Rows are heads x head_dim, sharded over `tensor`; columns are the embedding, sharded over `fsdp`.
  assert sorted(windows) == [((0, 16), (0, 16)), ((0, 16), (16, 32)), ((16, 32), (0, 16)), ((16, 32), (16, 32))]


@pytest.mark.parametrize("name", ["attention/query/kernel", "attention/output/kernel", "up/kernel", "up/bias"])
def test_a_layer_is_written_in_place_without_communication(bert, name):
  folder, _, shapes = bert
  shape, where = (
    engine.flatten_tree(tree)[f"layers/{name}"]
    for tree in (shapes, _shardings(folder, shapes, data=2, fsdp=2, tensor=2))
  )
  match = next(
    match
    for match in engine.match(tables.BERT, hf_folder.SafetensorsFolder(folder), shapes)
    if match.ours == f"layers/{name}"
  )
  tensor = placement.read_sharded(match, hf_folder.SafetensorsFolder(folder), where)
  stacked = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
  compiled = placement.layer_writer(match.layout, where).lower(stacked, tensor, 0).compile()
  assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective-"))
  memory, whole = compiled.memory_analysis(), 4 * np.prod(where.shard_shape(shape.shape))
  assert memory.alias_size_in_bytes == whole
  assert memory.temp_size_in_bytes <= whole / tiny_encoders.LAYERS


def test_nothing_is_read_before_everything_is_checked(bert):
  folder, tensors, shapes = bert
  del tensors["encoder.layer.2.output.dense.bias"]
  weight_files.write(folder, tensors | {"encoder.gate.weight": np.zeros((2, 2), np.float32)})
  recorded = Recorded(folder)
  with pytest.raises(InputError, match=r"1 unmapped: \+encoder\.gate\.weight; 1 unfilled: -layers/down/bias"):
    placement.place(tables.BERT, recorded, shapes, _shardings(folder, shapes, fsdp=8))
  assert not recorded.windows


def test_each_part_of_a_joined_tensor_is_placed_on_its_devices(tmp_path):
  joined = np.arange(3 * 8 * 4, dtype=np.float32).reshape(24, 4)
  save_file({"joined": joined}, tmp_path / "model.safetensors")
  names = ("query", "key", "value")
  table = tables.Table(
    "joined", tuple(tables.Rule(name, "joined", "(h k) d -> d h k", (i, 3)) for i, name in enumerate(names)), {}
  )
  shapes = {name: jax.ShapeDtypeStruct((4, 4, 2), np.float32) for name in names}
  axes = dict.fromkeys(names, ("embed", "heads", "head_dim"))
  where = sharding.tree_shardings(sharding.make_mesh(fsdp=2, tensor=4), shapes, axes)
  found = placement.place(table, hf_folder.SafetensorsFolder(tmp_path), shapes, where)
  for name, part in zip(names, np.split(joined, 3), strict=True):
    np.testing.assert_array_equal(found[name], part.T.reshape(4, 4, 2))


def test_no_file_stays_open_or_mapped_after_reading(bert):
  folder, _, shapes = bert
  opened = hf_folder.SafetensorsFolder(folder)
  engine.apply(tables.BERT, opened, shapes)
  placement.place(tables.BERT, opened, shapes, _shardings(folder, shapes, fsdp=8))
  assert str(folder) not in Path("/proc/self/maps").read_text()
