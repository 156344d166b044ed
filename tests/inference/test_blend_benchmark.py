"""`benchmarks.blend_ranking` runs at a small size, with and without classifiers."""

import re
import subprocess
import sys

import pytest

from tests.helpers.miniature_runs import ROOT


@pytest.mark.parametrize("dim", [0, 8])
def test_it_prints_the_time_of_each_part(dim):
  sizes = ["--labels=300", "--train_queries=500", "--queries=8", "--block=4", f"--dim={dim}"]
  command = [sys.executable, "-m", "benchmarks.blend_ranking", *sizes]
  done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  for part in ("words, candidates and features", "trees", "ranking", "all"):
    assert re.search(rf"^{part}: [\d.]+ ms a query", done.stdout, re.MULTILINE), done.stdout
