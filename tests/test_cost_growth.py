"""`benchmarks.cost_growth` at its smallest size: tables, JSON, plots; the compiled parts with a fake compiler."""

import importlib.util
import json
import math
from xml.etree import ElementTree

import pytest

from benchmarks import cost_growth, log_charts
from tests.helpers.cpu_slices import LINK_BANDWIDTH, cpu_slice
from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.compiling import Program, ProgramMemory
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.machine import GIB

_SVG = "{http://www.w3.org/2000/svg}"


def _fake_compiler(plan, program, to_come):
  """A program that takes a second of memory traffic and half a second of links, and needs what is held."""
  del to_come
  cost = Cost(hbm_bytes=plan.where.chip.hbm_bandwidth)
  cost.collectives[Collective("all-gather", round(LINK_BANDWIDTH), 2)] = 1.0
  memory = ProgramMemory(program.held, 0.0, 0.0, 0.0, 0.0, program.held)
  return Program(program.name, memory, cost, 1.0)


def _circles(path):
  return ElementTree.fromstring(path.read_text("utf-8")).findall(f".//{_SVG}circle")


def test_a_measured_part_prints_its_table_and_writes_json_and_a_plot(tmp_path, capsys):
  assert cost_growth.main(["--parts=search", "--size=tiny", f"--output={tmp_path}"]) == 0
  (part,) = json.loads((tmp_path / "cost_growth.json").read_text("utf-8")).values()
  assert {"command", "hardware", "versions"} <= set(part)
  assert [row["labels"] for row in part["rows"]] == [500, 2000]
  assert "| labels | cpu_ms_a_query |" in capsys.readouterr().out
  assert len(_circles(tmp_path / "cost_growth_search.svg")) == 2 * 3


@pytest.mark.slow
def test_measured_parts_print_tables_and_write_json_and_plots(tmp_path, capsys):
  assert cost_growth.main(["--parts=search", "--size=tiny", f"--output={tmp_path}"]) == 0
  both = ["--parts=virtual", "--size=tiny", f"--output={tmp_path}", f"--plots={tmp_path / 'plots'}"]
  assert cost_growth.main(both) == 0
  written = json.loads((tmp_path / "cost_growth.json").read_text("utf-8"))
  assert list(written) == ["search", "virtual"], "a part leaves the rows of the others"
  assert all({"command", "hardware", "versions"} <= set(part) for part in written.values())
  search, virtual = (written[name]["rows"] for name in written)
  assert [row["labels"] for row in search] == [500, 2000] and search[1]["labels_gib"] == 2000 * 16 * 4 / GIB
  assert [row["devices"] for row in virtual] == [1, 2]
  assert virtual[1]["first_loss"] == pytest.approx(virtual[0]["first_loss"], rel=1e-5)
  assert virtual[1]["arrays_mib"] < 0.6 * virtual[0]["arrays_mib"], "devices share the parameters"
  printed = capsys.readouterr().out
  assert "| labels | cpu_ms_a_query |" in printed and "\n| 2,000 |" in printed
  assert len(_circles(tmp_path / "cost_growth_search.svg")) == 2 * 3
  assert len(_circles(tmp_path / "plots" / "cost_growth_virtual.svg")) == 2 * 3


def test_without_libtpu_its_parts_are_one_line_and_the_others_run(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert cost_growth.main(["--parts=batch,search", "--size=tiny", f"--output={tmp_path}"]) == 1
  said = capsys.readouterr()
  assert said.err.startswith("batch: libtpu is not installed") and said.err.count("\n") == 1
  assert "pip install 'vixml-jax[tpu]'" in said.err
  assert "\n| 2,000 |" in said.out


def test_an_unknown_part_is_refused(capsys):
  with pytest.raises(SystemExit):
    cost_growth.main(["--parts=labels,layers"])
  assert "no part layers; choose among labels, search" in capsys.readouterr().err


def test_rows_of_labels_count_the_runs_of_each_program():
  config = cost_growth.full_config(cost_growth.TINY_MODEL | {"train.batch_size": 64})
  rows = list(cost_growth.label_rows(cpu_slice(), config, (10_000, 1_000_000), _fake_compiler))
  assert [row["labels"] for row in rows] == [10_000] * 3 + [1_000_000] * 3
  times = {(row["labels"], row["program"].partition(",")[0]): row["lower_bound_ms"] for row in rows}
  assert times[10_000, "search"] == times[1_000_000, "search"] == 1000.0, "one run"
  assert times[1_000_000, "centroids"] > times[10_000, "centroids"]
  assert times[1_000_000, "prototypes"] > times[10_000, "prototypes"] >= 1000.0
  memory = [row["gib_a_chip"] for row in rows if row["program"] == "prototypes"]
  assert memory[1] - memory[0] >= 4 * 990_000 * 128 / 8 / GIB, "the rows of the labels are split over the devices"


def test_a_row_of_a_step_has_the_share_of_the_links():
  config = cost_growth.full_config(cost_growth.TINY_MODEL | {"train.batch_size": 64})
  row = cost_growth.step_row(cost_growth.plan_on(cpu_slice(), config), _fake_compiler)
  assert (row["batch"], row["chips"], row["lower_bound_ms"], row["expected_ms"]) == (64, 8, 1000.0, 2000.0)
  assert row["percent_links"] == pytest.approx(row["links_ms"] / 20) and row["links_ms"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_compiled_parts_run_with_libtpu(tmp_path):
  assert cost_growth.main(["--parts=labels,batch,devices", "--size=tiny", f"--output={tmp_path}"]) == 0
  assert len(_circles(tmp_path / "cost_growth_labels.svg")) == 2 * 2 * 3


def test_axes_are_logarithmic():
  svg = log_charts.log_chart("a < b", [log_charts.Panel("y", "x", {"line": [(1, 1), (10, 10), (100, 100), (50, 0)]})])
  circles = ElementTree.fromstring(svg).findall(f".//{_SVG}circle")
  across, up = ([float(circle.get(name)) for circle in circles] for name in ("cx", "cy"))
  assert len(circles) == 3, "a point that is not positive is left out"
  assert math.isclose(across[1] - across[0], across[2] - across[1], abs_tol=0.2)
  assert math.isclose(up[0] - up[1], up[1] - up[2], abs_tol=0.2)
  assert "prefers-color-scheme: dark" in svg and "a &lt; b" in svg


@pytest.mark.parametrize(
  "low,high,ticks", [(0.3, 4.0, [0.2, 0.5, 1.0, 2.0, 5.0]), (5.0, 5.0, [2.0, 5.0, 10.0]), (1.0, 10.0, [1, 2, 5, 10])]
)
def test_ticks_are_round_and_enclose_the_values(low, high, ticks):
  assert log_charts.round_values(low, high) == ticks
