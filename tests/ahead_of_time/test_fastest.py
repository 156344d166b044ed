"""The search for the fastest training step: it finds what compiling every candidate would find."""

import itertools

import pytest

from tests.helpers.cpu_slices import cpu_slice
from tests.helpers.miniature_runs import load_config
from vixml_jax.ahead_of_time import report
from vixml_jax.ahead_of_time.compiling import Program, ProgramMemory
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.fastest import fastest_fit
from vixml_jax.ahead_of_time.plan import bytes_a_chip
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.ahead_of_time.workload import Workload

SIZE = DataSize(20_000, 0, 10_000, 15.0, 0.0)


@pytest.fixture(scope="module")
def workload():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  config.train.update(dict(batch_size=256, chunk_rows=128))
  return Workload.of(config, SIZE)


def fake_compiler(seconds):
  """Returns a compiler whose programs take `seconds(plan)`, and the plans that it compiled."""
  compiled = []

  def compile_step(plan):
    compiled.append(plan)
    rows = plan.mesh_plan.chunk_rows / (plan.mesh_plan.data * plan.mesh_plan.fsdp)
    needs = 1e6 * rows * (1 if plan.workload.config.encoder.remat else 3)
    held = bytes_a_chip(plan.train_arguments)
    memory = ProgramMemory(held, 0.0, needs, 0.0, 0.0, held + needs)
    return Program("train step", memory, Cost(hbm_bytes=seconds(plan) * plan.where.chip.hbm_bandwidth), 1.0)

  return compile_step, compiled


def slow_meshes(plan):
  """Seconds of a plan: fewer with little sharding, many chunks cost more, and recomputation costs a tenth."""
  mesh = plan.mesh_plan
  remat = 1.1 if plan.workload.config.encoder.remat else 1.0
  return 1e3 * remat * (1 + mesh.tensor / 8 + mesh.fsdp / 16) / mesh.chunk_rows


def test_the_fastest_that_fits_is_found_and_is_the_fastest_of_all(workload):
  compiler, compiled = fake_compiler(slow_meshes)
  tried = fastest_fit(workload, cpu_slice(200e6), compiler, most=10_000)
  assert len(tried) == len(compiled)
  fitting = [each for each in tried if each.fits]
  assert tried[: len(fitting)] == fitting and 0 < len(fitting) < len(tried), "those that fit come first"
  assert tried[0].seconds == min(each.seconds for each in fitting)
  assert {bool(each.candidate.keys) for each in tried} == {True, False}, "with and without recomputed layers"
  assert len({each.candidate.plan.mesh_plan for each in tried}) > 10


def test_the_search_ends_when_no_candidate_can_be_faster(workload):
  compiler, compiled = fake_compiler(lambda plan: 1e-9)
  tried = fastest_fit(workload, cpu_slice(), compiler, most=10_000)
  assert len(compiled) == len(tried) == 1, "the first takes less than the bounds of all others"


def test_at_most_so_many_candidates_are_compiled(workload, caplog):
  compiler, compiled = fake_compiler(lambda plan: 1e3)
  with caplog.at_level("INFO"):
    fastest_fit(workload, cpu_slice(), compiler, most=3)
  assert len(compiled) == 3 and "candidates are left out: --search=3 are compiled" in caplog.text
  assert "candidate 3 of" in caplog.text and caplog.text.count("expected 2") == 3, "2,000 s, at half of the bound"


def test_the_table_has_the_flags_of_the_fastest(workload, capsys, tmp_path):
  compiler, _ = fake_compiler(slow_meshes)
  named = lambda plan, program, to_come: compiler(plan)
  assert report.find_fastest(workload.config, cpu_slice(200e6), SIZE, 4, tmp_path / "search.json", named)
  printed = capsys.readouterr().out
  assert "fastest that fits: --config.mesh.data=" in printed and (tmp_path / "search.json").is_file()
  lines = list(itertools.takewhile(lambda line: not line.startswith("fastest"), printed.splitlines()))
  assert len(lines) == 5, "a heading and four candidates"


def test_it_says_so_if_nothing_fits(workload, capsys):
  compiler, _ = fake_compiler(slow_meshes)
  assert not report.find_fastest(workload.config, cpu_slice(1e6), SIZE, 4, None, lambda plan, *_: compiler(plan))
  assert "no candidate's arrays fit the chips" in capsys.readouterr().out
