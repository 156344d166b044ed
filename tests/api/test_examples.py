"""The programs in examples/ run, and print what they promise."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.documents import ROOT

pytestmark = pytest.mark.slow


def run(name, folder):
  done = subprocess.run(
    [sys.executable, "-W", "ignore", str(ROOT / "examples" / name)],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_ten_lines_learn_the_labels(tmp_path):
  output = run("ten_lines.py", tmp_path)
  assert float(re.match(r"P@1 on \d+ test queries: (\d+\.\d) %\n", output)[1]) >= 50
  assert {line.rsplit(" ", 1)[0] for line in output.splitlines()[1:]} == {"blue", "leather", "hat"}


def test_a_sentence_transformers_model_trains_on_batches_of_the_sampler(tmp_path):
  output = run("sentence_transformers_sampler.py", tmp_path)
  losses = [float(loss) for loss in re.findall(r"mean loss (\d\.\d+)", output)]
  assert len(losses) == 3 and losses[2] < losses[1]
  assert output.splitlines()[0].endswith("batches of random queries")
