"""Commands that succeed print their own lines only: nothing of absl, libtpu, XLA, transformers or warnings."""

import csv
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.documents import ROOT
from tests.helpers.miniature import WORDS
from tests.helpers.miniature_runs import TINY, load_config, write_encoder

ROWS = 1_400  # From 1,000 on, rows are held out, and the blend is fitted.
COMMANDS = {
  "train": "train --data={folder}/t.csv --workdir={folder}/run {tiny} --config.train.epochs=1",
  "evaluate": "evaluate --workdir={folder}/run --small_vectors=32,8",
  "predict": "predict --workdir={folder}/run --queries={folder}/q.jsonl --output={folder}/top.jsonl --ranking=blend",
  "encode": "encode --workdir={folder}/run --queries={folder}/q.jsonl --output={folder}/vectors --dims=8",
  "add labels": "add-labels --workdir={folder}/run --labels={folder}/new.jsonl",
  "export of vectors": "export --workdir={folder}/run --format=label-vectors --output={folder}/label-vectors",
  "export of weights": "export --workdir={folder}/run --format=hf --output={folder}/hf",
  "export for texts": "export --workdir={folder}/run --format=sentence-transformers --output={folder}/st",
  "export as a graph": "export --workdir={folder}/run --format=onnx --output={folder}/onnx",
  "describe": "describe --workdir={folder}/run",
  "describe a config": "describe --config=quickstart",
}
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d \S")
_NOISE = re.compile(
  r"Warning\b|WARNING|libtpu|absl|Traceback|^[IWEF]\d{4}\b|site-packages|\[transformers\]", re.MULTILINE
)
# XLA's alarm about a compilation of more than two minutes, which takes seconds unless the machine is very busy.
_SLOW = re.compile(r"^E\d{4} .*slow_operation_alarm.*\n\n?\*+\n.*\n\*+\n", re.MULTILINE)
# Writes each record of the log that another package makes to a file, since all have the same form on stderr.
_RECORDER = """
import logging, os, sys

class Recorded(logging.LogRecord):
  def __init__(self, name, *args, **kwargs):
    super().__init__(name, *args, **kwargs)
    if name.split(".")[0] not in ("vixml_jax", "__main__"):
      with open(os.environ["FOREIGN_RECORDS"], "a") as file:
        print(name, self.levelname, self.getMessage(), file=file)

logging.setLogRecordFactory(Recorded)
"""
_OF_TESTS = ("JAX", "XLA", "HF_", "TOKENIZERS", "OMP_", "PYTHONWARNINGS")  # Variables that users do not set.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("quiet")
  rng = np.random.default_rng(0)
  with (folder / "t.csv").open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["text", "labels"])
    for _ in range(ROWS):
      words = rng.choice(WORDS, 4)
      table.writerow([" ".join(words), f"{words[0]}|{words[1]}"])
  (folder / "q.jsonl").write_text('{"title": "arrow up"}\n{"title": "cloud"}\n')
  (folder / "new.jsonl").write_text('{"uid": "new", "title": "arrow cloud"}\n')
  config = load_config("custom")
  config.encoder.update(TINY)
  write_encoder(folder / "encoder", config.encoder)
  (folder / "recorder").mkdir()
  (folder / "recorder" / "sitecustomize.py").write_text(_RECORDER)
  return folder


def run(folder, command):
  """Returns the result of a command in the environment of a user, and the log records of other packages."""
  tiny = [f"--config.encoder.{key}={value}" for key, value in TINY.items()]
  tiny += [f"--config.encoder.pretrained={folder}/encoder", "--config.dataset.max_length=16"]
  tiny += ["--config.prototype.num_heads=4", "--config.prototype.mlp_dim=32", "--config.eval.bootstrap_samples=20"]
  tiny += [f"--config.dataset.data_dir={folder}/data"]
  records = folder / "records"
  records.write_text("")
  environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_TESTS)}
  environment |= {"PYTHONPATH": f"{folder / 'recorder'}:{ROOT}", "FOREIGN_RECORDS": str(records), "HF_HUB_OFFLINE": "1"}
  arguments = command.format(folder=folder, tiny=" ".join(tiny)).split()
  result = subprocess.run(
    [sys.executable, "-m", "vixml_jax", *arguments], cwd=folder, env=environment, capture_output=True, text=True
  )
  return result, records.read_text()


def noise(folder, name, command):
  """Returns what a command prints that is not its own, by where it appears."""
  result, records = run(folder, command)
  assert result.returncode == 0, (name, result.stderr)
  stderr = _SLOW.sub("", result.stderr)
  foreign = [line for line in stderr.splitlines() if not _LOG_LINE.match(line) or _NOISE.search(line)]
  found = {"stderr": foreign, "stdout": _NOISE.findall(result.stdout), "log of other packages": records.splitlines()}
  return {place: lines for place, lines in found.items() if lines}


@pytest.mark.slow
def test_commands_that_succeed_print_their_own_lines_only(folder):
  found = {name: noise(folder, name, command) for name, command in COMMANDS.items()}
  assert not {name: places for name, places in found.items() if places}


@pytest.mark.parametrize("command", ["--help", "train --help", "predict --help", "--version", "completion bash"])
def test_help_prints_nothing_on_stderr(folder, command):
  result, records = run(folder, command)
  assert (result.returncode, result.stderr, records) == (0, "", "")


def test_noise_is_found(folder):
  """The test above can fail: a warning, a line of C++ and a record of another package are each found."""
  fault = "import logging, os, warnings; warnings.warn('old'); os.write(2, b'I0000 00:00:1 tpu.cc:5] no\\\\n');"
  fault += "logging.getLogger('jax').warning('slow')"
  code = f'exec("{fault}")'
  path = folder / "recorder" / "sitecustomize.py"
  before = path.read_text()
  path.write_text(before + code)
  try:
    found = noise(folder, "help", "--help")
  finally:
    path.write_text(before)
  assert len(found["stderr"]) >= 3 and found["log of other packages"] == ["jax WARNING slow"]
