"""The choice of the mesh: the fewest devices along `fsdp` that leave most of the memory free, kept when resuming."""

import jax
import pytest

from tests.helpers.cpu_slices import cpu_slice
from tests.helpers.miniature_runs import load_config, miniature_config
from vixml_jax import sharding
from vixml_jax.ahead_of_time.plan import MeshPlan, mesh_plan_of
from vixml_jax.errors import InputError
from vixml_jax.run import configuration
from vixml_jax.run.mesh_choice import choose_mesh, with_mesh
from vixml_jax.run.setup import set_up_run, write_config

# MiniLM-L3: word, position and type embeddings with a norm, and three layers with twelve vectors.
LAYER = 4 * 384 * 384 + 2 * 384 * 1536 + 4 * 384 + 1536 + 384 + 4 * 384
MINILM = 4 * ((30_522 + 512 + 2 + 2) * 384 + 3 * LAYER)  # Bytes.


def chosen(memory, encoder="minilm-l3", **keys):
  config = load_config("lf_amazon_titles_131k", f"encoder={encoder},mesh=auto")
  config.update_from_flattened_dict(keys)
  return choose_mesh(config, 8, sharding.make_mesh, memory)


def test_the_encoder_is_on_every_device_if_it_takes_a_quarter_of_the_memory():
  needed = 4 * MINILM  # Values, gradients and two moments; a quarter of the memory is 4 times as much.
  assert chosen(4.001 * needed) == (8, 1, 1)
  assert chosen(3.9 * needed) == (4, 2, 1)
  assert chosen(3.9 * needed / 2) == (2, 4, 1)


def test_too_little_memory_for_any_mesh_is_a_warning(caplog):
  assert chosen(MINILM / 2) == (1, 8, 1)
  assert "more than a quarter with any mesh; check with python -m vixml_jax.aot_compile" in caplog.text


def test_devices_that_share_products_stay_as_they_are():
  assert chosen(1e12, **{"mesh.tensor": 2}) == (4, 1, 2)
  with pytest.raises(InputError, match="config.mesh.tensor=3: must divide the 8 devices"):
    chosen(1e12, **{"mesh.tensor": 3})


def test_a_frozen_base_has_neither_gradients_nor_moments():
  config = load_config("lf_amazon_titles_131k", "encoder=qwen2.5-0.5b,mesh=auto")
  base = 2 * 0.494e9  # Bytes in bfloat16.
  sides = [(896, 896), (896, 128), (896, 128), (896, 896), (896, 4864), (896, 4864), (4864, 896)]
  adapters = 4 * 24 * 256 * sum(rows + columns for rows, columns in sides)
  assert choose_mesh(config, 8, sharding.make_mesh, 4 * 1.01 * (base + 4 * adapters)) == (8, 1, 1)
  assert choose_mesh(config, 8, sharding.make_mesh, 4 * 0.99 * (base + 4 * adapters)) == (4, 2, 1)


def test_meshes_that_do_not_divide_the_parameters_are_not_chosen():
  with pytest.raises(InputError, match="config.mesh.fsdp=0: no mesh of 8 devices can be used .*set the sizes yourself"):
    chosen(1e12, **{"mesh.tensor": 8, "encoder.num_heads": 12})  # 12 heads for 8 devices.


def test_a_continued_run_keeps_its_mesh(tmp_path, monkeypatch):
  config = miniature_config(tmp_path, num_train=40)
  config.mesh.fsdp = 0
  config.train.update(dict(batch_size=16, chunk_rows=16))
  monkeypatch.setattr(sharding, "device_memory", lambda devices: 1e12)
  setup = set_up_run(config, tmp_path / "run", extract=True)
  assert dict(setup.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  write_config(setup, tmp_path / "run")
  written = configuration.read(tmp_path / "run" / "config.json")
  assert written.mesh.to_dict() == {"data": 8, "fsdp": 1, "tensor": 1}
  monkeypatch.setattr(sharding, "device_memory", lambda devices: 1.0)
  assert with_mesh(config, tmp_path / "run").mesh == written.mesh, "less memory changes nothing"
  assert with_mesh(config, tmp_path / "other").mesh.fsdp == 8
  assert config.mesh.fsdp == 0, "the caller's config is unchanged"
  monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:4])
  monkeypatch.setattr(
    sharding, "make_mesh", lambda *sizes, make=sharding.make_mesh: make(*sizes, devices=jax.devices())
  )
  assert with_mesh(config, tmp_path / "run").mesh.to_dict() == {"data": 1, "fsdp": 4, "tensor": 1}, "other devices"


def test_aot_compile_chooses_the_same_mesh():
  config = load_config("lf_amazon_titles_131k", "encoder=minilm-l3,mesh=auto")
  assert mesh_plan_of(config, cpu_slice(3.9 * 4 * MINILM)) == MeshPlan(4, 2, 1, config.train.chunk_rows)


def test_another_value_of_the_variant_is_an_error():
  with pytest.raises(ValueError, match="mesh=fast: must be auto; set config.mesh.data"):
    load_config("lf_amazon_titles_131k", "encoder=minilm-l3,mesh=fast")
