"""Plans against training: equal shapes and shardings, programs that run, the compiler's account of memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cpu_slices import cpu_slice
from tests.helpers.miniature_runs import load_config, miniature_config
from tests.helpers.training_checks import training_parts
from vixml_jax.ahead_of_time.chips import GIB
from vixml_jax.ahead_of_time.compiling import compile_encode, compile_train, refused_bytes
from vixml_jax.ahead_of_time.programs import MeshPlan, Plan, Workload, bytes_a_chip, item_lengths, mesh_plan_of
from vixml_jax.ahead_of_time.sizes import DataSize, data_size
from vixml_jax.errors import InputError
from vixml_jax.input.batches import make_batch
from vixml_jax.training.step import device_batch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A miniature that is set up for training, with its data."""
  folder = tmp_path_factory.mktemp("aot")
  config = miniature_config(folder, num_train=40)
  config.mesh.update(dict(data=2, fsdp=2, tensor=2))
  return training_parts(config, folder)


@pytest.fixture(scope="module")
def plan(run):
  """The same run without its data."""
  size = DataSize(len(run.queries), 0, run.setup.data.num_labels, tokens=6.0, images=0.0)
  where = cpu_slice()
  return Plan.of(Workload.of(run.setup.config, size), where, mesh_plan_of(run.setup.config, where))


def described(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


def test_a_plan_has_the_shapes_and_shardings_of_training(run, plan):
  assert described(plan.state) == described(run.abstract)
  order = np.arange(len(run.queries))
  batch = make_batch(run.queries, order, 16, run.setup.layout, seed=0, epoch=0, step=0)
  real = device_batch(batch, None, run.setup.mesh)
  assert jax.tree.structure(plan.batch) == jax.tree.structure(real)
  for (path, planned), array in zip(
    jax.tree_util.tree_leaves_with_path(plan.batch), jax.tree.leaves(real), strict=True
  ):
    name = jax.tree_util.keystr(path)
    assert (planned.dtype, planned.sharding) == (array.dtype, array.sharding), name
    if ".inputs" not in name and ".filled" not in name:  # Their number of chunks depends on the texts.
      assert planned.shape == array.shape, name


def test_the_programs_of_a_plan_run(run, plan):
  fill = lambda tree: jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), tree)
  new, metrics = plan.lower_train().compile()(*fill(plan.train_arguments))
  assert int(new.step) == 1 and np.isfinite(float(metrics["loss"]))
  _, frozen, *chunk = fill(plan.encode_arguments)
  pooled = plan.lower_encode().compile()(new.params, frozen, *chunk)
  assert pooled.shape == (run.setup.config.train.chunk_rows, run.setup.layout.slots, run.setup.config.encoder.embed_dim)


def test_memory_and_collectives_of_a_plan_are_the_compiler_s(plan):
  train, encode = compile_train(plan), compile_encode(plan)
  # The program does not use `filled` of a single chunk, so this is no argument of it.
  assert train.memory.arguments + train.memory.others == bytes_a_chip(plan.train_arguments)
  # The encoding step uses neither the optimizer's state nor the prototype network; both stay in memory.
  chunk = bytes_a_chip(plan.encode_arguments) - bytes_a_chip(plan.state.params)
  assert encode.memory.arguments + encode.memory.others == bytes_a_chip(plan.state) + chunk
  assert encode.memory.others > bytes_a_chip(plan.state.opt_state)
  for memory in (train.memory, encode.memory):
    assert memory.total == sum(dataclasses.astuple(memory)[:-1])
  assert train.cost.collectives and train.cost.endless == 0
  # Forward, recomputed and backward: at least three times the forward pass of the whole batch.
  chunks = plan.workload.batch.items.tokens.shape[0] * plan.filled
  assert train.cost.flops > 3 * chunks * encode.cost.flops


def test_devices_that_share_parameters_also_share_rows(tmp_path):
  config = miniature_config(tmp_path, "qwen2.5-0.5b")
  workload = Workload.of(config, DataSize(40, 0, 24, tokens=6.0, images=0.0))
  plans = [Plan.of(workload, cpu_slice(), MeshPlan(*mesh, 1, 16)) for mesh in ((8, 1), (1, 8))]
  replicated, sharded = (compile_train(plan).cost.flops for plan in plans)
  assert sharded < 1.1 * replicated


def test_a_synthetic_batch_has_the_requested_lengths():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3,images=3")
  config.fusion.modality_dropout = 0.0
  size = DataSize(10_000, 0, 5_000, tokens=12.0, images=2.5)
  lengths = item_lengths(Workload.of(config, size).batch.items.segments)
  assert len(lengths) == 2 * config.train.batch_size
  assert lengths.mean() == pytest.approx(12.0 + 2.5, rel=0.02)


def test_image_features_are_where_training_puts_them():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3,images=3")
  workload = Workload.of(config, data_size(config))
  features = Plan.of(workload, cpu_slice(hbm_bytes=1e12), MeshPlan(8, 1, 1, 128)).batch.image_features
  assert 8 * bytes_a_chip(features) == pytest.approx(2 * 1152 * 3 * (2_248_619 + 970_237 + 1_305_265), rel=1e-3)
  on_host = Plan.of(workload, cpu_slice(), MeshPlan(8, 1, 1, 128)).batch
  assert on_host.image_features is None and on_host.inputs.images.features.shape[-1] == 1152


@pytest.mark.parametrize("mesh", [dict(data=3), dict(data=8, tensor=2)], ids=str)
def test_a_mesh_that_does_not_match_the_slice_raises_an_error(mesh):
  config = load_config("custom")
  config.mesh.update(mesh)
  with pytest.raises(InputError, match="does not equal the number of devices, 8"):
    mesh_plan_of(config, cpu_slice())


def test_chunks_that_the_mesh_does_not_divide_raise_an_error_that_names_the_key():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  config.train.chunk_rows = 12
  with pytest.raises(InputError, match="train.chunk_rows=12"):
    Plan.of(Workload.of(config, DataSize(100, 0, 100, 15.0, 0.0)), cpu_slice(), MeshPlan(8, 1, 1, 12))


def test_the_compiler_s_error_says_how_much_memory_is_needed():
  messages = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.00G) exceeds "
    "available HBM (15.75G).",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm. Exceeded by 1.25G.",
  )
  assert [refused_bytes(message) for message in messages] == [17 * GIB] * 2
  assert refused_bytes("INTERNAL: something else (17.00G)") is None
