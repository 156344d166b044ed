"""SIGTERM at random instants of every command: it ends within ten seconds, and the same command then succeeds."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers.miniature_runs import ROOT
from vixml_jax import stopping

_ARGUMENTS = {
  "prepare_data": ["--config=configs/custom.py", "--config.dataset.raw_dir={raw}", "--config.dataset.data_dir={new}"],
  "extract_features": [
    "--config=configs/custom.py",
    "--config.dataset.raw_dir={raw}",
    "--config.dataset.data_dir={new}",
    "--checkpoint={tower}",
  ],
  "main": [
    "--config=configs/custom.py:encoder=minilm-l6",
    "--workdir={new}/run",
    "--config.dataset.data_dir={new}/data",
    "--config.train.epochs=4",
    "--config.checkpoint.every_steps=1000",
    "--config.eval.every_epochs=3",
  ],
  "evaluate": ["--workdir={run}", "--data_dir={data}"],
  "predict": ["--workdir={run}", "--queries={queries}", "--k=3", "--batch_size=4", "--output={new}/top.jsonl"],
  "encode": ["--workdir={run}", "--queries={queries}", "--batch_size=4", "--output={new}/embeddings"],
  "export": ["--workdir={run}", "--format=label-vectors", "--output={new}/exported"],
  "add_labels": ["--workdir={run}", "--labels={labels}"],
  "study": [
    "--study=seeds",
    "--seeds=2",
    "--output={new}/study",
    "--config=configs/custom.py:encoder=minilm-l6",
    "--config.dataset.data_dir={new}/data",
  ],
  "serve": ["--workdir={run}", "--port=0"],
  "describe": ["--config=configs/lf_amazon_1.3m.py"],
  "aot_compile": ["--config=configs/quickstart.py", "--topology=v5e:2x2", "--num_queries=9000", "--num_labels=900"],
}
_LINE = re.compile(r"(stopped by SIGTERM.*|saved step \d+); .*start the same command again to continue|saved step .*")

# Starts commands as `python -m` does, in forks of a process that has done the slow imports. Reads JSON: the name of a
# module, its arguments, and seconds until SIGTERM or null. Answers with status, seconds, seconds after SIGTERM, stderr.
_SERVER = """
import json, os, runpy, signal, sys, threading, time
import vixml_jax.experiment, ml_collections.config_flags, vixml_jax.inference.loading, vixml_jax.exporting.export
for line in sys.stdin:
  module, arguments, delay, log = json.loads(line)
  began, asked = time.monotonic(), None
  child = os.fork()
  if not child:
    for number, name in ((1, os.devnull), (2, log)):
      os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [module, *arguments]
    status = 99
    try:
      runpy.run_module(f"vixml_jax.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
      status = stop.code
    except BaseException:
      import traceback
      traceback.print_exc()
    sys.stderr.flush()
    os._exit(status or 0)
  if delay is not None:
    timer = threading.Timer(delay, os.kill, (child, signal.SIGTERM))
    timer.start()
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  seconds = time.monotonic() - began
  if delay is not None:
    timer.cancel()
  print(json.dumps([status, seconds, delay is not None and seconds - delay]), flush=True)
"""


class Commands:
  """Runs commands in forks of one process."""

  def __init__(self, folder):
    self._log = folder / "stderr"
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", _SERVER],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(self, module, arguments, delay=None):
    self._process.stdin.write(json.dumps([module, arguments, delay, str(self._log)]) + "\n")
    self._process.stdin.flush()
    status, seconds, after = json.loads(self._process.stdout.readline())
    return status, seconds, after, self._log.read_text()

  def close(self):
    self._process.communicate()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  started = Commands(tmp_path_factory.mktemp("commands"))
  yield started
  started.close()


@pytest.mark.slow
@pytest.mark.parametrize("module", _ARGUMENTS)
def test_a_command_that_sigterm_stops_at_any_instant_ends_within_ten_seconds_and_continues(
  module, commands, with_images, tmp_path
):
  if module == "aot_compile":
    pytest.importorskip("libtpu", reason="needs a compiler for TPUs: pip install -e '.[tpu]'")
  rng = random.Random(module)
  trained = with_images
  queries, labels = tmp_path / "queries.jsonl", tmp_path / "labels.jsonl"
  queries.write_text("".join(json.dumps({"title": f"sun {row}"}) + "\n" for row in range(40)))
  labels.write_text(json.dumps({"uid": "new", "title": "horse"}) + "\n")
  places = dict(
    raw=trained.raw,
    tower=trained.tower,
    data=trained.data,
    run=tmp_path / "run",
    new=tmp_path / "new",
    queries=queries,
    labels=labels,
  )
  arguments = [part.format(**places) for part in _ARGUMENTS[module]]
  if module in ("main", "study"):
    arguments += _model_flags(trained)

  def fresh():
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    (tmp_path / "new").mkdir()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copytree(trained.workdir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    # Both were moved after the training.
    config["encoder"]["pretrained"], config["dataset"]["raw_dir"] = str(trained.encoder), str(trained.raw)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))

  fresh()
  # The server has no end: all its instants are before it is ready, or while it waits.
  whole = 20.0 if module == "serve" else _finished(commands, module, arguments)
  times = 10 if whole < 3 else 3
  longest = 0.0
  for _ in range(times):
    fresh()
    status, seconds, after, errors = commands.run(module, arguments, rng.random() * whole)
    assert "Traceback" not in errors, errors
    assert after < stopping.SECONDS, (seconds, errors)
    longest = max(longest, after)
    if module == "serve":
      assert status == 0, errors
    elif status == -signal.SIGTERM:
      assert not errors  # The command had not begun.
    elif status:
      assert status == stopping.STATUS, errors
      assert _LINE.fullmatch(errors.splitlines()[-1]), errors
    if module != "serve" and not (tmp_path / "new" / "exported").exists():  # Stopped after its folder was complete.
      _finished(commands, module, arguments)
  print(f"{module}: {times} times, ended within {longest:.1f} s")


def _finished(commands, module, arguments):
  """Runs a command to its end and returns its seconds."""
  status, seconds, _, errors = commands.run(module, arguments)
  assert status == 0, errors
  return seconds


def _model_flags(trained):
  """Returns the flags of a run like that of a trained workdir."""
  config = json.loads((trained.workdir / "config.json").read_text())
  wanted = ("encoder", "prototype", "train", "mining", "prompt", "features", "fusion")
  given = {f"{room}.{key}": value for room in wanted for key, value in config[room].items()}
  given |= {
    "images": 2,
    "dataset.max_length": 20,
    "dataset.validation_fraction": 0.2,
    "dataset.raw_dir": str(trained.raw),
  }
  given |= {"encoder.pretrained": str(trained.encoder), "features.checkpoint": str(trained.tower), "features.dim": 8}
  return [
    f"--config.{key}={value}"
    for key, value in given.items()
    if not isinstance(value, (list, dict)) and value is not None and key != "train.epochs"
  ]
