import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from tests.helpers.miniature_runs import load_config, miniature_config, run_commands
from vixml_jax.ahead_of_time import chips, compiling, report
from vixml_jax.ahead_of_time.chips import GIB, Chip, Slice, tpu_slice
from vixml_jax.ahead_of_time.compiling import Memory, Program, compile_encode, compile_train
from vixml_jax.ahead_of_time.cost import Collective, Cost, program_cost
from vixml_jax.ahead_of_time.fitting import nearest_fit
from vixml_jax.ahead_of_time.programs import Plan, Spread, Workload, bytes_a_chip, item_lengths, spread_asked_for
from vixml_jax.ahead_of_time.roofline import Roofline, model_flops
from vixml_jax.ahead_of_time.sizes import DataSize, data_size
from vixml_jax.errors import InputError
from vixml_jax.input.batches import make_batch
from vixml_jax.run.from_config import model_of, set_up
from vixml_jax.training.step import device_batch

_PLENTY = Chip(hbm_bytes=8 * GIB, flops=1e12, hbm_bandwidth=1e10, link_bandwidth=1e9, axes=2, wraps_at=16)


def cpu_slice(chip=_PLENTY):
  """The eight CPU devices in the place of a TPU slice: the same code compiles for them."""
  return Slice("cpu:2x4", chip, (2, 4), jax.devices())


def optimized(function, *arguments):
  """HLO of a compiled function, and XLA's own count of its FLOPs."""
  compiled = jax.jit(function).lower(*arguments).compile()
  return compiled.as_text(), compiled.cost_analysis()["flops"]


def test_what_a_tpu_program_says_is_counted_as_by_hand():
  # As libtpu 0.0.42 writes programs: memory spaces, a batched product as a convolution with holes, an exchange that is
  # spread over fusions, updates in place, a loop whose bounds stand in its condition and before it, unrolled.
  cost = program_cost((Path(__file__).with_name("tpu_program.hlo")).read_text())
  assert cost.endless == 0
  # Three turns, from 1 below 6 in twos. Products of 2 x 4 pairs of 32 x 256 matrices, laid out as one convolution.
  assert cost.flops == 3 * 2 * (2 * 4) * 32 * 32 * 256
  # The slice that is picked is read from HBM and the update is written there; all else stays in the chip's VMEM.
  assert cost.hbm_bytes == 3 * (32 * 1024 * 2 + 2 * 4 * 32 * 32 * 4)
  # One all-gather in two fusions; an all-reduce of which a slice is kept.
  whole = 1024 * 1024 * 2
  assert cost.collectives == {Collective("all-gather", whole, 2): 3, Collective("reduce-scatter", whole, 2): 3}
  assert cost.moved == 3 * 2 * whole / 2


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
  def layers(x, weights):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

  text, of_xla = optimized(layers, jnp.ones((16, 32)), jnp.ones((7, 32, 32)))
  assert program_cost(text).flops == 7 * 2 * 16 * 32 * 32
  assert of_xla < 2 * 2 * 16 * 32 * 32, "XLA counts loops by itself now: program_cost may go"


def test_a_loop_within_a_loop_counts_as_the_product():
  def inner(x, weights):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

  def outer(xs, weights):
    return jax.lax.map(lambda x: inner(x, weights), xs)

  text, _ = optimized(outer, jnp.ones((3, 16, 32)), jnp.ones((5, 32, 32)))
  assert program_cost(text).flops == 3 * 5 * 2 * 16 * 32 * 32


def test_a_branch_counts_by_its_share():
  def chunks(filled, xs, w):
    return jax.lax.map(lambda each: jax.lax.cond(each[0], lambda x: x @ w, lambda x: x, each[1]), (filled, xs))

  text, _ = optimized(chunks, jnp.array([True, True, False, False]), jnp.ones((4, 16, 32)), jnp.ones((32, 32)))
  assert program_cost(text).flops == 4 * 2 * 16 * 32 * 32
  assert program_cost(text, branch_share=0.5).flops == 2 * 2 * 16 * 32 * 32


def test_precise_products_in_float32_take_six_passes():
  def product(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

  text, of_xla = optimized(product, jnp.ones((32, 64)), jnp.ones((64, 16)))
  cost = program_cost(text)
  assert cost.flops == of_xla == 2 * 32 * 64 * 16
  assert cost.unit_flops in (cost.flops, 6 * cost.flops)  # XLA for CPUs may leave the precision out of the text.
  precise = text.replace("lhs_contracting_dims", "operand_precision={highest,highest}, lhs_contracting_dims")
  assert program_cost(precise).unit_flops == 6 * cost.flops


def test_traffic_of_a_kernel_is_what_goes_in_and_out():
  text, _ = optimized(lambda x: x * 2 + 1, jnp.ones((256, 1024)))
  assert program_cost(text).hbm_bytes == 2 * 256 * 1024 * 4


def test_collectives_are_counted_by_kind_size_and_group():
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  ring = [(i, (i + 1) % 4) for i in range(4)]

  def exchange(x):
    def turn(c, _):
      parts = (
        jax.lax.psum(x * c, "b"),
        jax.lax.all_gather(x * c, "a", tiled=True),
        jax.lax.psum_scatter(x + c, "b", tiled=True),
        jax.lax.ppermute(x - c, "b", ring),
        jax.lax.all_to_all(x / c, "b", 0, 0, tiled=True),
      )
      return c + sum(part.sum() for part in parts), None

    return jax.lax.scan(turn, jnp.float32(1), None, length=3)[0][None]

  spec = PartitionSpec("b", None)
  mapped = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("b"), check_vma=False)
  text, _ = optimized(mapped, jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=NamedSharding(mesh, spec)))
  part = 64 * 128 * 4
  assert program_cost(text).collectives == {
    Collective("all-reduce", part, 4): 3,
    Collective("all-gather", 2 * part, 2): 3,
    Collective("reduce-scatter", part, 4): 3,
    Collective("collective-permute", part, 4): 3,
    Collective("all-to-all", part, 4): 3,
  }


def test_what_a_ring_moves():
  assert Collective("all-gather", 1000, 4).moved == 750
  assert Collective("reduce-scatter", 1000, 4).moved == 750
  assert Collective("all-reduce", 1000, 4).moved == 1500
  assert Collective("collective-permute", 1000, 4).moved == 1000


def test_the_roofline_is_the_slowest_of_three():
  where = Slice("cpu:2x4", _PLENTY, (2, 4), jax.devices())
  cost = Cost(flops=1e12, unit_flops=3e12, hbm_bytes=5e10, collectives={Collective("all-gather", 4 * 10**9, 4): 2.0})
  roofline = Roofline.of(cost, where)
  assert (roofline.compute, roofline.hbm, roofline.interconnect) == (3.0, 5.0, 6.0)
  assert (roofline.seconds, roofline.bound) == (6.0, "interconnect")
  assert where.ring_bandwidth(8) == 2e9, "eight chips span both axes"
  assert Slice("v5e:16x16", _PLENTY, (16, 16), []).ring_bandwidth(4) == 2e9, "an axis of 16 is a ring"


# Plans.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A miniature that is set up for training, with its data."""
  folder = tmp_path_factory.mktemp("aot")
  config = miniature_config(folder, num_train=40)
  config.mesh.update(dict(data=2, fsdp=2, tensor=2))
  return set_up(config, folder)


@pytest.fixture(scope="module")
def plan(run):
  """The same without its data."""
  size = DataSize(len(run.queries), 0, run.corpus.num_labels, tokens=6.0, images=0.0)
  where = cpu_slice()
  return Plan.of(Workload.of(run.config, size), where, spread_asked_for(run.config, where))


def described(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


def test_a_plan_is_what_training_runs(run, plan):
  assert described(plan.state) == described(run.abstract)
  batch = device_batch(
    make_batch(run.queries, np.arange(len(run.queries)), 16, run.layout, seed=0, epoch=0, step=0), run.mesh
  )
  assert plan.batch.keys() == batch.keys()
  for name, real in batch.items():
    if real is None:
      assert plan.batch[name] is None
      continue
    made_up = plan.batch[name]
    assert (made_up.dtype, made_up.sharding) == (real.dtype, real.sharding), name
    if name not in ("tokens", "segments", "positions", "filled"):  # These have as many chunks as the texts fill.
      assert made_up.shape == real.shape, name


def test_a_plan_s_programs_run(run, plan):
  fill = lambda tree: jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), tree)
  new, metrics = plan.lower_train().compile()(*fill(plan.train_arguments))
  assert int(new.step) == 1 and np.isfinite(float(metrics["loss"]))
  _, frozen, *chunk = fill(plan.encode_arguments)
  pooled = plan.lower_encode().compile()(new.params, frozen, *chunk)
  assert pooled.shape == (run.config.train.chunk_rows, run.layout.slots, run.config.encoder.embed_dim)


def test_memory_and_collectives_of_a_plan_are_the_compiler_s(plan):
  train, encode = compile_train(plan), compile_encode(plan)
  # A single chunk is not asked whether it holds anything.
  assert train.memory.arguments + train.memory.others == bytes_a_chip(plan.train_arguments)
  # An encoding step is not given the optimizer's state, nor the prototype network; they stay where they are.
  chunk = bytes_a_chip(plan.encode_arguments) - bytes_a_chip(plan.state.params)
  assert encode.memory.arguments + encode.memory.others == bytes_a_chip(plan.state) + chunk
  assert encode.memory.others > bytes_a_chip(plan.state.opt_state)
  for memory in (train.memory, encode.memory):
    assert memory.total == sum(dataclasses.astuple(memory)[:-1])
  assert train.cost.collectives and train.cost.endless == 0
  # Forward, recomputed and backward: at least three times the forward pass of the whole batch.
  chunks = plan.workload.batch.items.tokens.shape[0] * plan.filled
  assert train.cost.flops > 3 * chunks * encode.cost.flops


def test_devices_that_share_parameters_share_rows_too(tmp_path):
  config = miniature_config(tmp_path, "qwen2.5-0.5b")
  workload = Workload.of(config, DataSize(40, 0, 24, tokens=6.0, images=0.0))
  flops = [compile_train(Plan.of(workload, cpu_slice(), Spread(*mesh, 1, 16))).cost.flops for mesh in ((8, 1), (1, 8))]
  assert flops[1] < 1.1 * flops[0]


def test_a_made_up_batch_has_the_lengths_asked_for():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3,images=3")
  config.fusion.modality_dropout = 0.0
  size = DataSize(10_000, 0, 5_000, tokens=12.0, images=2.5)
  lengths = item_lengths(Workload.of(config, size).batch.items.segments)
  assert len(lengths) == 2 * config.train.batch_size
  assert lengths.mean() == pytest.approx(12.0 + 2.5, rel=0.02)


def test_images_lie_where_training_would_put_them():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3,images=3")
  size = data_size(config)
  workload = Workload.of(config, size)
  roomy = cpu_slice(dataclasses.replace(_PLENTY, hbm_bytes=1e12))
  bank = 8 * bytes_a_chip(Plan.of(workload, roomy, Spread(8, 1, 1, 128)).batch["image_bank"])
  assert bank == pytest.approx(2 * 1152 * 3 * (2_248_619 + 970_237 + 1_305_265), rel=1e-3)
  on_host = Plan.of(workload, cpu_slice(), Spread(8, 1, 1, 128)).batch
  assert on_host["image_bank"] is None and on_host["images"]["features"].shape[-1] == 1152


def test_model_flops_are_two_a_weight_and_token_forward_and_six_in_all():
  config = load_config("custom", "encoder=minilm-l6")
  config.train.free_vectors = 8
  model = model_of(config)
  depth, width, mlp, tokens = 6, 384, 1536, 20
  weights = depth * (4 * width * width + 2 * width * mlp)
  attention = depth * 4 * tokens * tokens * width  # Every token with every other, for logits and for values.
  lengths = np.full(3, tokens)
  assert model_flops(model, lengths, train=False) == 3 * (2 * weights * tokens + attention)
  assert model_flops(model, lengths, train=True) == 3 * 3 * (2 * weights * tokens + attention)


def test_frozen_weights_have_no_gradient_of_their_own():
  config = load_config("lf_amazon_1.3m", "encoder=qwen2.5-0.5b")
  model = model_of(config)
  depth, width, mlp, rank, heads, kv = 24, 896, 4864, 256, 14 * 64, 2 * 64
  shapes = [(width, heads), (width, kv), (width, kv), (heads, width), (width, mlp), (width, mlp), (mlp, width)]
  base = depth * sum(a * b for a, b in shapes)
  adapters = depth * sum(rank * (a + b) for a, b in shapes)
  attention = depth * 4 * heads
  assert model_flops(model, np.ones(1), train=True) == 4 * base + 6 * adapters + 3 * attention


# Sizes.


def test_published_sizes_need_no_data():
  size = data_size(load_config("lf_amazon_1.3m", "images=3"))
  assert (size.train, size.labels, size.tokens, size.images) == (2_248_619, 1_305_265, 15.0, 3.0)
  assert data_size(load_config("lf_amazon_131k")).tokens == 128
  given = data_size(load_config("lf_amazon_1.3m"), num_queries=1000, tokens=20.0)
  assert (given.train, given.labels, given.tokens) == (1000, 1_305_265, 20.0)


@pytest.mark.parametrize(
  "arguments,message",
  [
    (dict(), "custom: its size is not known.*--num_queries and --num_labels"),
    (dict(num_queries=0, num_labels=5), "--num_queries=0: must be at least 1"),
    (dict(num_queries=5, num_labels=5, tokens=64.0), "--tokens_per_item=64: must lie between 3 and .*max_length=32"),
    (dict(num_queries=5, num_labels=5, images=1.0), "--images_per_item=1: .*config.images=0"),
  ],
)
def test_a_size_that_is_unknown_or_impossible_is_refused(arguments, message, tmp_path):
  config = load_config("custom")
  config.dataset.data_dir = str(tmp_path)
  with pytest.raises(InputError, match=message):
    data_size(config, **arguments)


# Fitting.


def fake_compiler(bytes_a_row, compiled, cost=None):
  """Instead of minutes of compiling: a program needs its arguments, and so many bytes for each row of a chip."""

  def compile_program(plan):
    spread = plan.spread
    compiled.append(spread)
    arguments = bytes_a_chip(plan.train_arguments)
    temporaries = bytes_a_row * spread.chunk_rows / (spread.data * spread.fsdp)
    return Program("train step", Memory(arguments, 0.0, temporaries, 0.0, 0.0, arguments + temporaries), cost, 1.0)

  return compile_program


def fit(chip, bytes_a_row, asked):
  """What a search from a plan finds, and which plans it compiled."""
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  config.train.batch_size = 256
  workload, where, compiled = Workload.of(config, DataSize(20_000, 0, 10_000, 15.0, 0.0)), cpu_slice(chip), []
  compile_program = fake_compiler(bytes_a_row, compiled)
  refused = Plan.of(workload, where, asked)
  return nearest_fit(workload, where, refused, compile_program(refused), compile_program), compiled[1:], refused


def test_too_many_rows_at_a_time_are_halved_until_they_fit():
  arguments = fit(_PLENTY, 0.0, Spread(8, 1, 1, 128))[2]
  room = bytes_a_chip(arguments.train_arguments) + 5e6
  found, compiled, _ = fit(dataclasses.replace(_PLENTY, hbm_bytes=room), 1e6, Spread(8, 1, 1, 128))
  assert found[0].spread == Spread(8, 1, 1, 32), "16 rows a chip were asked for, 4 fit"
  assert compiled == [found[0].spread], "estimates spare compiling what does not fit"


def test_parameters_are_spread_where_the_arguments_are_too_many():
  asked = Spread(8, 1, 1, 128)
  whole = bytes_a_chip(fit(_PLENTY, 0.0, asked)[2].train_arguments)
  found, _, _ = fit(dataclasses.replace(_PLENTY, hbm_bytes=0.7 * whole), 1e3, asked)
  plan, program = found
  assert plan.spread.fsdp * plan.spread.tensor > 1 and program.memory.total <= 0.7 * whole


def test_the_search_gives_up_where_nothing_fits():
  found, compiled, _ = fit(dataclasses.replace(_PLENTY, hbm_bytes=1e6), 1e3, Spread(8, 1, 1, 128))
  assert found is None and not compiled


def test_a_report_says_whether_it_fits_and_what_would(tmp_path, capsys):
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  size = DataSize(20_000, 0, 10_000, 15.0, 0.0)
  cost = Cost(flops=2e9, unit_flops=2e9, hbm_bytes=1e8, collectives={Collective("all-reduce", 10**6, 8): 3.0})
  compilers = (fake_compiler(1e7, [], cost), fake_compiler(1e5, [], cost))
  assert report.check_fit(config, cpu_slice(), size, None, compilers)
  assert "all-reduce" in capsys.readouterr().out
  small = cpu_slice(dataclasses.replace(_PLENTY, hbm_bytes=300e6))
  assert not report.check_fit(config, small, size, tmp_path / "fit.json", compilers)
  printed = capsys.readouterr().out
  written = json.loads((tmp_path / "fit.json").read_text())
  assert not written["asked"]["fits"] and written["nearest_fit"]["fits"]
  spread = written["nearest_fit"]["spread"]
  assert f"--config.train.chunk_rows={spread['chunk_rows']}" in printed and "does not fit" in printed
  # 20,000 queries in batches of 2,048 for 300 epochs, each step 2e9 FLOPs at 1e12 a second but 1e8 bytes at 1e10.
  train = written["asked"]["train_step"]
  assert train["seconds"]["roofline"] == train["seconds"]["hbm"] == 0.01
  assert train["hours"] == pytest.approx(math.ceil(20_000 / 2048) * 300 * 0.01 / 3600)


def test_the_compiler_s_refusal_says_how_much_was_needed():
  messages = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.00G) exceeds "
    "available HBM (15.75G).",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm. Exceeded by 1.25G.",
  )
  assert [compiling._needed(message) for message in messages] == [17 * GIB] * 2
  assert compiling._needed("INTERNAL: something else (17.00G)") is None


@pytest.mark.parametrize(
  "mesh,message", [(dict(data=3), "does not make 8 devices"), (dict(data=8, tensor=2), "does not make 8 devices")]
)
def test_a_mesh_that_does_not_make_the_slice_is_refused(mesh, message):
  config = load_config("custom")
  config.mesh.update(mesh)
  with pytest.raises(InputError, match=message):
    spread_asked_for(config, cpu_slice())


def test_a_batch_that_does_not_divide_is_refused():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  config.train.chunk_rows = 12
  with pytest.raises(InputError, match="train.chunk_rows=12: must divide by mesh.data x mesh.fsdp = 8"):
    Plan.of(Workload.of(config, DataSize(100, 0, 100, 15.0, 0.0)), cpu_slice(), Spread(8, 1, 1, 12))


# The command.


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "v5e:2x2x2", "h100:4x4", "v5p:2x2"])
def test_an_unknown_topology_is_refused(topology):
  with pytest.raises(InputError, match=f"--topology={topology}: .*v5e:4x4"):
    tpu_slice(topology)


def test_without_libtpu_it_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install 'vixml-jax\[tpu\]'"):
    tpu_slice("v5e:2x2")


def test_the_command_helps_and_refuses(tmp_path):
  config = "--config=configs/lf_amazon_1.3m.py"
  results = run_commands(
    {
      "help": ["aot_compile", "--help"],
      "no topology": ["aot_compile", config],
      "unknown topology": ["aot_compile", config, "--topology=v5e:x"],
      "bad size": ["aot_compile", config, "--topology=v5e:2x2", "--tokens_per_item=99"],
    },
    tmp_path,
  )
  status, stdout, _ = results.pop("help")
  assert status == 0 and "v5e:4x4" in stdout
  for name, (status, stdout, stderr) in results.items():
    assert status == 1 and not stdout, name
    assert stderr.startswith("error: --to") and len(stderr.splitlines()) == 1, stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'vixml-jax[tpu]'")
def test_a_small_encoder_fits_a_tpu_that_is_not_there(run, capsys):
  config = run.config.copy_and_resolve_references()
  config.encoder.dtype = "bfloat16"
  config.mesh.update(dict(data=2, fsdp=2, tensor=1))
  assert report.check_fit(config, tpu_slice("v5e:2x2"), DataSize(10_000, 0, 5_000, 6.0, 0.0))
  printed = capsys.readouterr().out
  assert "15.75 GiB" in printed and "all-gather" in printed
