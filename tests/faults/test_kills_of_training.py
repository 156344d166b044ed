"""SIGKILL at random instants of a training run with images, from raw files to label index: the end is the same."""

import collections
import json
import os
import re
import subprocess
import sys

import pytest

from tests.faults.killed_runs import PHASES
from tests.helpers.miniature_runs import ROOT

_KILLS = 50


def _campaign(folder, kills, seed=0):
  """Returns what the process reports: its undisturbed run, and each run that was killed."""
  place = folder / "place"
  place.mkdir()
  flags = os.environ["XLA_FLAGS"].replace("_device_count=8", "_device_count=1")  # See conftest.
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-m", "tests.faults.killed_runs", folder, str(kills), str(seed)],
    cwd=ROOT,
    text=True,
    capture_output=True,
    env=os.environ | {"XLA_FLAGS": flags},
  )
  assert done.returncode == 0, done.stderr
  reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
  assert reports[0]["status"] == 0, done.stderr
  runs = [report for report in reports[1:] if "run" in report]
  assert all(run["status"] == 0 and not run["wrong"] for run in runs), done.stdout + done.stderr
  return runs


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
  assert sum(len(run["hit"]) for run in _campaign(tmp_path, 2)) == 2


@pytest.mark.slow
def test_50_kills_of_training_runs_with_images_change_no_bit(tmp_path, record_property):
  runs = _campaign(tmp_path, _KILLS, seed=1)
  hit = collections.Counter(_phase(stage) for run in runs for stage in run["hit"])
  assert hit.total() >= _KILLS
  assert set(PHASES) <= set(hit), f"a phase was never hit: {hit}"
  record_property("kills: training with images", hit.total())
  print(len(runs), "runs;", dict(hit))


def _phase(stage):
  return next((name for name, pattern in PHASES.items() if re.match(pattern, stage)), "other")
