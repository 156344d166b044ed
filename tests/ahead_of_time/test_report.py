"""The report of a config on a slice, and the search for the nearest mesh and chunk size that fit."""

import importlib.util
import json
import math

import pytest

from tests.helpers.cpu_slices import ROOMY_CHIP, cpu_slice
from tests.helpers.miniature_runs import load_config, miniature_config
from vixml_jax.ahead_of_time import report
from vixml_jax.ahead_of_time.chips import tpu_slice
from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.compiling import Program, ProgramMemory
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.fitting import nearest_fit
from vixml_jax.ahead_of_time.programs import MeshPlan, Plan, Workload, bytes_a_chip
from vixml_jax.ahead_of_time.sizes import DataSize

ASKED = MeshPlan(8, 1, 1, 128)


def fake_compiler(bytes_per_row, compiled, cost=None):
  """Replaces minutes of compilation: a program needs its arguments, and `bytes_per_row` for each row of a chip."""

  def compile_program(plan):
    mesh_plan = plan.mesh_plan
    compiled.append(mesh_plan)
    arguments = bytes_a_chip(plan.train_arguments)
    temporaries = bytes_per_row * mesh_plan.chunk_rows / (mesh_plan.data * mesh_plan.fsdp)
    memory = ProgramMemory(arguments, 0.0, temporaries, 0.0, 0.0, arguments + temporaries)
    return Program("train step", memory, cost, 1.0)

  return compile_program


@pytest.fixture(scope="module")
def workload():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  config.train.batch_size = 256
  return Workload.of(config, DataSize(20_000, 0, 10_000, 15.0, 0.0))


@pytest.fixture(scope="module")
def asked_bytes(workload):
  """Bytes of the arguments of the training step on each chip."""
  return bytes_a_chip(Plan.of(workload, cpu_slice(), ASKED).train_arguments)


def fit(workload, hbm_bytes, bytes_per_row):
  """The result of a search from `ASKED`, and the mesh plans that it compiled."""
  where, compiled = cpu_slice(hbm_bytes), []
  compile_program = fake_compiler(bytes_per_row, compiled)
  refused = Plan.of(workload, where, ASKED)
  return nearest_fit(workload, where, refused, compile_program(refused), compile_program), compiled[1:]


def test_chunks_are_halved_until_they_fit(workload, asked_bytes):
  found, compiled = fit(workload, asked_bytes + 5e6, bytes_per_row=1e6)
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
  size = DataSize(20_000, 0, 10_000, 15.0, 0.0)
  cost = Cost(flops=2e9, unit_flops=2e9, hbm_bytes=1e8, collectives={Collective("all-reduce", 10**6, 8): 3.0})
  compilers = (fake_compiler(1e7, [], cost), fake_compiler(1e5, [], cost))
  assert report.check_fit(config, cpu_slice(), size, None, compilers)
  assert "all-reduce" in capsys.readouterr().out
  assert not report.check_fit(config, cpu_slice(300e6), size, tmp_path / "fit.json", compilers)
  printed = capsys.readouterr().out
  written = json.loads((tmp_path / "fit.json").read_text())
  assert not written["asked"]["fits"] and written["nearest_fit"]["fits"]
  spread = written["nearest_fit"]["spread"]
  assert f"--config.train.chunk_rows={spread['chunk_rows']}" in printed and "does not fit" in printed
  # 20,000 queries in batches of 2,048 for 300 epochs; a step moves 1e8 bytes at 1e10 per second, its slowest part.
  train = written["asked"]["train_step"]
  assert train["seconds"]["roofline"] == train["seconds"]["hbm"] == 1e8 / ROOMY_CHIP.hbm_bandwidth == 0.01
  assert train["hours"] == pytest.approx(math.ceil(20_000 / 2048) * 300 * 0.01 / 3600)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_a_small_encoder_fits_a_tpu_that_does_not_exist(tmp_path, capsys):
  config = miniature_config(tmp_path, num_train=40)
  config.encoder.dtype = "bfloat16"
  config.mesh.update(dict(data=2, fsdp=2, tensor=1))
  assert report.check_fit(config, tpu_slice("v5e:2x2"), DataSize(10_000, 0, 5_000, 6.0, 0.0))
  printed = capsys.readouterr().out
  assert "15.75 GiB" in printed and "all-gather" in printed
