"""The report of a config on a slice, and the search for the nearest mesh and chunk size that fit."""

import importlib.util
import json
import math
import re

import jax
import pytest

from tests.helpers.cpu_slices import ROOMY_CHIP, cpu_slice
from tests.helpers.miniature_runs import load_config, miniature_config
from vixml_jax.ahead_of_time import report
from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.compiling import Program, ProgramMemory
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.estimate import estimate_run
from vixml_jax.ahead_of_time.fitting import nearest_fit
from vixml_jax.ahead_of_time.gpu import GPUS
from vixml_jax.ahead_of_time.host_memory import host_memory
from vixml_jax.ahead_of_time.machine import GIB
from vixml_jax.ahead_of_time.plan import MeshPlan, Plan, bytes_a_chip
from vixml_jax.ahead_of_time.programs import TRAIN_STEP, run_programs
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.ahead_of_time.topology import machine_of
from vixml_jax.ahead_of_time.workload import Workload

ASKED = MeshPlan(8, 1, 1, 128)


def fake_compiler(bytes_per_row, compiled, cost=None):
  """Replaces minutes of compilation: a program holds its arrays; the train step needs `bytes_per_row` in addition."""

  def compile_program(plan, program, to_come):
    mesh_plan = plan.mesh_plan
    compiled.append((mesh_plan, program.name))
    rows = mesh_plan.chunk_rows / (mesh_plan.data * mesh_plan.fsdp)
    temporaries = bytes_per_row * rows * (program.name == TRAIN_STEP)
    memory = ProgramMemory(program.held, 0.0, temporaries, 0.0, 0.0, program.held + temporaries)
    return Program(program.name, memory, cost, 1.0)

  return compile_program


@pytest.fixture(scope="module")
def workload():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  config.train.batch_size = 256
  return Workload.of(config, DataSize(20_000, 0, 10_000, 15.0, 0.0))


@pytest.fixture(scope="module")
def asked_bytes(workload):
  """Bytes that the program with the most arrays holds on each chip."""
  return max(program.held for program in run_programs(Plan.of(workload, cpu_slice(), ASKED)))


def fit(workload, hbm_bytes, bytes_per_row):
  """The result of a search from `ASKED`, and the mesh plans that it compiled."""
  where, compiled = cpu_slice(hbm_bytes), []
  compiler = fake_compiler(bytes_per_row, compiled)
  compile_train = lambda plan: next(compiler(plan, each, ()) for each in run_programs(plan) if each.name == TRAIN_STEP)
  refused = Plan.of(workload, where, ASKED)
  found = nearest_fit(workload, where, refused, compile_train(refused), compile_train)
  return found, [mesh_plan for mesh_plan, _ in compiled[1:]]


def test_chunks_are_halved_until_they_fit(workload, asked_bytes):
  train = bytes_a_chip(Plan.of(workload, cpu_slice(), ASKED).train_arguments)
  found, compiled = fit(workload, asked_bytes + 5e6, bytes_per_row=(asked_bytes + 5e6 - train) / 5)
  assert found[0].mesh_plan == MeshPlan(8, 1, 1, 32), "the config asks for 16 rows per chip, 4 fit"
  assert compiled == [found[0].mesh_plan], "plans whose estimate does not fit are not compiled"


def test_parameters_are_sharded_if_the_arguments_do_not_fit(workload, asked_bytes):
  found, _ = fit(workload, 0.7 * asked_bytes, bytes_per_row=1e3)
  plan, program = found
  assert plan.mesh_plan.fsdp * plan.mesh_plan.tensor > 1 and program.memory.total <= 0.7 * asked_bytes


def test_the_search_ends_if_nothing_fits(workload):
  found, compiled = fit(workload, 1e6, bytes_per_row=1e3)
  assert found is None and not compiled


def test_a_report_says_whether_a_config_fits_and_what_would(tmp_path, capsys):
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  size = DataSize(20_000, 4_000, 10_000, 15.0, 0.0)
  cost = Cost(flops=2e9, unit_flops=2e9, hbm_bytes=1e8, collectives={Collective("all-reduce", 10**6, 8): 3.0})
  compiled = []
  assert report.check_fit(config, cpu_slice(), size, None, fake_compiler(1e7, compiled, cost))
  printed = capsys.readouterr().out
  assert "all-reduce" in printed
  names = [program.name for program in run_programs(Plan.of(Workload.of(config, size), cpu_slice(), ASKED))]
  assert len(names) == len(set(names)) > 15
  assert {name for _, name in compiled} < set(names), "a program that runs at several times is compiled once"
  for name in names:
    assert f"\n{name} " in printed, "the table has a row for every program"
  assert not report.check_fit(config, cpu_slice(300e6), size, tmp_path / "fit.json", fake_compiler(1e7, [], cost))
  printed = capsys.readouterr().out
  written = json.loads((tmp_path / "fit.json").read_text())
  assert not written["asked"]["fits"] and written["nearest_fit"]["fits"]
  assert sorted(written["asked"]["programs"]) == sorted(names)
  spread = written["nearest_fit"]["spread"]
  assert f"--config.train.chunk_rows={spread['chunk_rows']}" in printed and "does not fit: train step needs" in printed
  # 20,000 queries in batches of 2,048 for 300 epochs; a step moves 1e8 bytes at 1e10 per second, its slowest part.
  train = written["asked"]["train_step"]
  assert train["seconds"]["roofline"] == train["seconds"]["hbm"] == 1e8 / ROOMY_CHIP.hbm_bandwidth == 0.01
  assert train["seconds"]["expected"] == 0.01 / ROOMY_CHIP.efficiency
  assert train["hours"] == pytest.approx(math.ceil(20_000 / 2048) * 300 * 0.01 / 3600)
  assert train["expected_hours"] == pytest.approx(train["hours"] / ROOMY_CHIP.efficiency)
  for row, digits in (("lower bound of the time", "10.00"), ("expected time", "20.00")):
    assert re.search(rf"^{row} +ms +{digits}", printed, re.MULTILINE)
  assert written["asked"]["hours"] > train["hours"]
  assert written["asked"]["expected_hours"] == pytest.approx(written["asked"]["hours"] / ROOMY_CHIP.efficiency)


def test_a_chunk_that_does_not_help_is_not_called_a_fit(workload, capsys):
  def compiler(plan, program, to_come):
    total = program.held + (1e12 if program.name == "search labels" else 0.0)
    return Program(program.name, ProgramMemory(program.held, 0.0, 0.0, 0.0, 0.0, total), Cost(hbm_bytes=1.0), 1.0)

  assert not report.check_fit(workload.config, cpu_slice(), workload.size, None, compiler)
  printed = capsys.readouterr().out
  assert "search labels needs" in printed and "The nearest that fits" not in printed


def test_the_memory_of_a_host_grows_with_its_texts_labels_and_features():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3,images=3")
  size = DataSize(1_000_000, 200_000, 500_000, 15.0, 3.0, labels_per_query=20.0)
  plan = Plan.of(Workload.of(config, size), cpu_slice(hbm_bytes=4 * GIB), MeshPlan(8, 1, 1, 128))
  memory = host_memory(plan)
  assert memory["tokens of all texts"] == 1_700_000 * (15 * 4 + 8)
  assert memory["image features"] == 1_700_000 * 3 * 1152 * 2, "they do not fit a quarter of the devices"
  assert 20e6 * 8 < memory["labels of queries"] < 20e6 * 32
  state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan.state))
  assert memory["copy of the state while a checkpoint is written"] == state, "one process has all devices"


def test_programs_that_run_at_several_times_differ_in_what_is_in_memory(workload):
  def compiler(plan, program, to_come):
    used = 0.5 * program.held
    return Program(
      program.name,
      ProgramMemory(used, 0.0, 1e6, 0.0, program.held - used, program.held + 1e6),
      Cost(hbm_bytes=1.0),
      1.0,
    )

  plan = Plan.of(workload, cpu_slice(), ASKED)
  estimated, programs = estimate_run(plan, compiler), {program.name: program for program in run_programs(plan)}
  for estimate in estimated.estimates:
    assert estimate.program.memory.total == pytest.approx(programs[estimate.program.name].held + 1e6)
  start, end = (estimated.find(f"encode training queries at the {when}").program.memory for when in ("start", "end"))
  assert start.arguments == end.arguments and start.others < end.others, "the train state is there at the end only"
  labels = estimated.find("encode labels").program.memory
  assert labels.arguments == start.arguments - bytes_a_chip(plan.rows(20_000)) + bytes_a_chip(plan.rows(10_000))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
@pytest.mark.parametrize(("topology", "fsdp"), [("v5e:2x2", 2), ("v5e:2x2*2", 4)])
def test_a_small_encoder_fits_tpus_that_do_not_exist(topology, fsdp, tmp_path, capsys):
  config = miniature_config(tmp_path, num_train=40)
  config.encoder.dtype = "bfloat16"
  config.mesh.update(dict(data=2, fsdp=fsdp, tensor=1))  # Two slices are divided along data.
  assert report.check_fit(config, machine_of(topology), DataSize(10_000, 1_000, 5_000, 6.0, 0.0))
  printed = capsys.readouterr().out
  assert f" on {topology}, {2 * fsdp} chips: mesh 2 x {fsdp} x 1" in printed
  assert "15.75" in printed and "all-gather" in printed


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the CUDA compiler: pip install -e '.[aot-gpu]'"
)
@pytest.mark.parametrize("kind", GPUS)
def test_a_small_encoder_fits_gpus_that_do_not_exist(kind, tmp_path, capsys):
  config = miniature_config(tmp_path, num_train=40)
  config.encoder.dtype = "bfloat16"
  config.mesh.update(dict(data=1, fsdp=2, tensor=1))
  written = tmp_path / "fit.json"
  assert report.check_fit(config, machine_of(f"{kind}:2"), DataSize(10_000, 1_000, 5_000, 6.0, 0.0), written)
  assert "75% of a GPU" in capsys.readouterr().out
  step = json.loads(written.read_text())["asked"]["train_step"]
  assert step["flops"] > step["model_flops_all_chips"] / 2, "calls of cuBLAS are counted"
  times = step["seconds"]
  assert times["compute"] < times["kernels"] <= times["roofline"] < times["expected"]
  assert times["kernels"] > 0.9 * times["hbm"], "asynchronous copies are a small part"
  assert step["sent"] > 0
