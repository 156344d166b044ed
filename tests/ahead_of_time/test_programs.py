"""Programs of a run: those that a run compiles, those that a plan lists, their memory and how often they run."""

import contextlib
import dataclasses
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import use_method
from tests.helpers.cpu_slices import cpu_slice
from tests.helpers.miniature_runs import load_config, miniature_config
from tests.helpers.training_checks import training_parts
from vixml_jax.ahead_of_time.compiling import compile_program, refused_bytes
from vixml_jax.ahead_of_time.machine import GIB
from vixml_jax.ahead_of_time.plan import MeshPlan, Plan, bytes_a_chip, mesh_plan_of
from vixml_jax.ahead_of_time.programs import ENCODE_STEP, TRAIN_STEP, run_programs
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.ahead_of_time.workload import Workload
from vixml_jax.errors import InputError
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.input.batches import make_batch
from vixml_jax.training.step import device_batch

# Programs with arrays that no table lists: they fill an array with zeros, or copy one or a part of it. Programs of
# numbers only, which JAX compiles for arithmetic outside of jit, are not listed either.
COPIES = {
  "_zeros": "rows of zeros, which the programs that fill them hold",
  "<lambda>": "an array of zeros; a parameter in another layout or type than that of its file",
  "new_classifiers": "classifiers of zeros, which the program that trains them holds",
  "_scaled": "a second copy of classifiers, while they are searched",
  "_only_trained": "classifiers without those that were never trained, in the memory of all",
  "_slice": "a block of a share, on its way to the host",
  "slice": "a part of a parameter, on its way to the checkpoint",
  "copy": "a second copy of pooled labels, which the prototypes without held-out queries hold",
  "write_layer": "a parameter of one layer, on its way from the file to those of all layers",
}
_COMPILING = re.compile(r"Compiling jit\((.*?)\) with global shapes and types \((.*?)\)\. Argument mapping", re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A miniature that is set up for training, with its data."""
  folder = tmp_path_factory.mktemp("aot")
  config = miniature_config(folder, num_train=40)
  config.mesh.update(dict(data=2, fsdp=2, tensor=2))
  return training_parts(config, folder)


def plan_of(config, num_queries, num_labels, **mesh):
  """The plan of a miniature without its data."""
  size = DataSize(num_queries, 20, num_labels, tokens=6.0, images=0.0, labels_per_query=2.0)
  where = cpu_slice()
  config = config.copy_and_resolve_references()
  config.mesh.update(mesh)
  return Plan.of(Workload.of(config, size), where, mesh_plan_of(config, where))


@pytest.fixture(scope="module")
def plan(run):
  """The same run without its data."""
  return plan_of(run.setup.config, len(run.queries), run.setup.data.num_labels)


def program_of(plan, name):
  return next(program for program in run_programs(plan) if program.name == name)


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


@contextlib.contextmanager
def compiled_programs():
  """Yields a set that grows by the name of every program compiled within the block, except those of numbers only."""
  found = set()

  class Handler(logging.Handler):
    def emit(self, record):
      message = _COMPILING.match(record.getMessage())
      if message and (not message[2] or re.search(r"\[\d|key<", message[2])):
        found.add(message[1])

  jax.clear_caches()
  logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Handler()
  logger.addHandler(handler)
  logger.propagate = False
  try:
    with jax.log_compiles():
      yield found
  finally:
    logger.removeHandler(handler)
    logger.propagate = True


@pytest.mark.parametrize(
  "changes",
  [pytest.param("decoder", marks=pytest.mark.slow), "held out", pytest.param("ngame", marks=pytest.mark.slow)],
)
def test_a_plan_lists_every_program_that_a_run_compiles(changes, tmp_path):
  config = miniature_config(tmp_path, "qwen2.5-0.5b" if changes == "decoder" else "minilm-l6", num_train=48)
  # Without held-out queries, on another mesh than that of `run`; with them on the same, which compiles less.
  config.mesh.update(dict(data=2, fsdp=2, tensor=2) if changes == "held out" else dict(data=2, fsdp=4, tensor=1))
  config.train.epochs = 2
  if changes == "ngame":
    use_method(config, "ngame")
  elif changes == "decoder":
    config.eval.update(dict(retrieval_search="joint", retrieval_hits=8))
  else:
    config.dataset.validation_fraction = 0.2
    config.eval.update(dict(retrieval_choose=True, blend=True, classifier_share=-1.0))
    config.encoder.random_init = True
  with compiled_programs() as compiled:
    train_and_evaluate(config, tmp_path / "run")
  plan = plan_of(config, 48, 24)
  # The name of a program is in the first line of its text.
  listed = {re.search(r"module @jit_(\S+)", each.lower().as_text())[1] for each in run_programs(plan)}
  unknown = compiled - listed - set(COPIES)
  assert not unknown, f"add these to ahead_of_time/programs.py: {unknown}"
  assert listed <= compiled, f"no run compiles these: {listed - compiled}"


def test_the_programs_of_a_plan_run(run, plan):
  fill = lambda tree: jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), tree)
  new, metrics = program_of(plan, TRAIN_STEP).lower().compile()(*fill(plan.train_arguments))
  assert int(new.step) == 1 and np.isfinite(float(metrics["loss"]))
  rows, frozen, chunk = fill((plan.rows(len(run.queries)), plan.frozen, plan.chunk))
  slots = run.setup.config.train.chunk_rows * run.setup.layout.slots
  ids = fill(plan.array((slots,), np.int32)) - 1
  stored, count = program_of(plan, ENCODE_STEP).lower().compile()(rows, new.params, frozen, chunk, None, ids)
  assert stored.shape == plan.rows(len(run.queries)).shape and int(count) == 0


def test_memory_and_collectives_of_a_plan_are_the_compiler_s(plan):
  train, encode = (compile_program(plan, program_of(plan, name)) for name in (TRAIN_STEP, ENCODE_STEP))
  # The program does not use `filled` of a single chunk, so this is no argument of it.
  assert train.memory.arguments + train.memory.others == bytes_a_chip(plan.train_arguments)
  # The encoding step uses neither the optimizer's state nor the prototype network; both stay in memory.
  used = bytes_a_chip((plan.rows(40), plan.chunk)) + 4 * plan.workload.layout.chunk_rows * plan.workload.layout.slots
  assert encode.memory.arguments + encode.memory.others == bytes_a_chip(plan.state) + used
  assert encode.memory.others > bytes_a_chip(plan.state.opt_state)
  for memory in (train.memory, encode.memory):
    assert memory.total == sum(dataclasses.astuple(memory)[:-1])
  assert train.cost.collectives and train.cost.endless == 0
  # Forward, recomputed and backward: at least three times the forward pass of the whole batch.
  chunks = plan.workload.batch.items.tokens.shape[0] * plan.filled
  assert train.cost.flops > 3 * chunks * encode.cost.flops


def test_every_program_holds_its_own_arguments(plan):
  for program in run_programs(plan):
    arguments = program.lower().compile().memory_analysis().argument_size_in_bytes
    assert arguments <= program.held + 64, program.name  # Scalars are not counted.


def test_programs_run_as_often_as_in_a_run(plan):
  runs = {program.name: program.runs for program in run_programs(plan)}
  config = plan.workload.config
  assert runs[TRAIN_STEP] == config.train.epochs * math.ceil(40 / 16)
  # The means of 24 labels are one block; the 40 queries are one chunk or a few.
  assert runs["label centroids from the bank: means"] == config.train.epochs - 1
  assert runs["search labels"] == runs["search training queries"] == 1
  # Clusters of at most 4 are computed after each of three epochs. Their size doubles in the second.
  assert runs["cluster queries into 16"] == 3


@pytest.mark.slow
def test_devices_that_share_parameters_also_share_rows(tmp_path):
  config = miniature_config(tmp_path, "minilm-l3")
  workload = Workload.of(config, DataSize(40, 0, 24, tokens=6.0, images=0.0))
  plans = [Plan.of(workload, cpu_slice(), MeshPlan(*mesh, 1, 16)) for mesh in ((8, 1), (1, 8))]
  replicated, sharded = (compile_program(plan, program_of(plan, TRAIN_STEP)).cost.flops for plan in plans)
  assert sharded < 1.1 * replicated


def test_image_features_are_where_training_puts_them():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3,images=3")
  size = DataSize(2_248_619, 970_237, 1_305_265, 15.0, 3.0)
  workload = Workload.of(config, size)
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
