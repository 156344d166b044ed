"""SIGKILL at random instants of a training run with images, from raw files to label index: the end is the same."""

import collections
import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.miniature_runs import ROOT

_KILLS = 50
_PHASES = {
  "preparation": "(hash raw files|prepare (train|test|labels)|compare .*custom/)",
  "extraction": "encode (train|test|labels) images",
  "feature set": r"(write (train|test|labels) features|compare .*custom_features/)",
  "image features": "load (train|test|labels) features",
  "tokenizing": "tokenize",
  "free vectors": r"divide 24 rows",
  "training": "train$",
  "checkpoint": "save a checkpoint",
  "mining": r"divide 18 rows",
  "centroids": "(encode .* training queries|compute the means)",
  "evaluation": r"(encode \d+ (test queries|labels)|evaluate|compute \d+ prototypes|place)",
  "blend": "(count the words|train classifiers|fit the blend)",
  "embeddings": "write embeddings",
  "label index": "write the label index",
}
"""Name of a phase -> regular expression of its stages; in the order of a run."""

# A process that has imported everything and forks. A child trains and reports its stages; it is killed when it is told
# to be, and another one goes on in its place. Arguments: folder, number of kills, seed.
_TRAINS = """
import hashlib, json, os, random, re, shutil, signal, sys, time
from pathlib import Path
import jax
import lightgbm, sklearn.feature_extraction.text, scipy.sparse
import numpy as np
import orbax.checkpoint as ocp
from tests.helpers.trained_workdirs import with_tower
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.run import configuration
from vixml_jax.stages import Callback, reporting

place, kills, phases = Path(sys.argv[1]) / "place", int(sys.argv[2]), json.loads(sys.argv[3])
rng = random.Random(int(sys.argv[4]))

class Reports(Callback):
  def on_stage(self, stage):
    if stage.ended or not stage.seconds:
      os.write(1, f"{'end' if stage.ended else 'start'} {stage.name}\\n".encode())

def hashes(tree):
  return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

def summary(run):
  step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
  with ocp.PyTreeCheckpointer() as reader:
    found = {item: hashes(reader.restore(run / "checkpoints" / str(step) / item))
             for item in ("model", "training", "mining")}
  final = json.loads((run / "final_metrics.json").read_text())
  found["final"] = {key: value for key, value in final.items() if key not in ("train_seconds", "tokens_per_second")}
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  found["metrics"] = [
    [line["step"], line["epoch"], line["split"],
     {} if line["split"] == "goodput" else {k: v for k, v in line["values"].items() if k != "train_seconds"}]
    for line in lines]
  (index,) = [path for path in (run / "index").iterdir() if path.is_dir()]
  found["index"] = {path.relative_to(index).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                    for path in sorted(index.rglob("*")) if path.is_file() and path.name != "index.json"}
  described = json.loads((index / "index.json").read_text())
  found["index"]["index.json"] = {key: value for key, value in described.items() if key != "checkpoint"}
  found["step"] = step
  return found

def write_config():
  config = with_tower(place, images=2)
  config.train.epochs, config.checkpoint.every_steps, config.eval.every_epochs = 3, 2, 2
  config.eval.update(dict(test_images=(), retrieval_choose=False, blend=True))
  configuration.write(config, place / "config.json")

def train():
  with reporting(Reports()):
    train_and_evaluate(configuration.read(place / "config.json"), place / "run")
  os.write(1, f"done {json.dumps(summary(place / 'run'))}\\n".encode())

def start(work):
  read, write = os.pipe()
  child = os.fork()
  if child:
    os.close(write)
    return child, os.fdopen(read)
  os.dup2(write, 1)
  try:
    work()
  except BaseException:
    import traceback
    traceback.print_exc()
    os._exit(1)
  os._exit(0)

def attempt(kill, work=train):
  # Returns the stages in progress, and the summary of a run that has ended. `kill` is a phase and how much of it must
  # have passed, or a number of seconds.
  began, open_stages, seen, told = time.monotonic(), [], [], None
  child, lines = start(work)
  if isinstance(kill, float):
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, kill)
  for line in lines:
    word, _, name = line.rstrip().partition(" ")
    if word == "done":
      told = json.loads(name)
    elif word == "start":
      open_stages.append(name)
      seen.append((name, time.monotonic() - began))
      if isinstance(kill, tuple) and re.match(kill[0], name):
        kill = kill[0], kill[1] - 1, kill[2]
        if kill[1] == 0:
          time.sleep(kill[2])
          os.kill(child, signal.SIGKILL)
    elif name in open_stages:
      open_stages.remove(name)
  signal.setitimer(signal.ITIMER_REAL, 0)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  return status, open_stages, told, time.monotonic() - began, seen

def report(**values):
  print(json.dumps(values), flush=True)

attempt(None, write_config)
if kills > 4:  # Compiles everything, so that the next run tells how long one takes.
  attempt(None)
  for folder in ("run", "data"):
    shutil.rmtree(place / folder)
status, _, expected, seconds, seen = attempt(None)
report(seconds=seconds, stages=seen, status=status)
done, number, order, missing = 0, 0, [], list(phases.values()) if kills > 4 else []
while done < kills or missing and number < kills:
  for folder in ("run", "data"):
    shutil.rmtree(place / folder)
  # A run is killed in a few phases one after the other, or at random seconds. Then it is killed in phases that these
  # kills have missed: some take milliseconds.
  if done >= kills:
    plan = [(pattern, rng.choice([1, 2, 3, 4]), 0) for pattern in missing[:4]]
  elif number % 2 == 0:
    if not order:
      order = rng.sample(range(len(phases)), len(phases))
    chosen, order = sorted(order[:4]), order[4:]
    plan = [(list(phases.values())[i], rng.choice([1, 1, 2]), rng.choice([0, rng.random() * 0.2])) for i in chosen]
  else:
    plan = [rng.random() * seconds for _ in range(3)]
  hit, status, told = [], None, None
  for kill in [*(plan if done >= kills else plan[: kills - done]), None]:
    status, open_stages, told, _, _ = attempt(kill)
    if status != -signal.SIGKILL:
      break
    done += 1
    hit.append(open_stages[-1] if open_stages else "between stages")
    missing = [pattern for pattern in missing if not re.match(pattern, hit[-1])]
  wrong = [key for key in expected if told is None or told[key] != expected[key]]
  report(run=number, hit=hit, status=status, wrong=wrong)
  if wrong and told:
    report(expected={key: expected[key] for key in wrong}, found={key: told[key] for key in wrong})
  number += 1
"""


def _campaign(folder, kills, seed=0):
  """Returns what the process reports: its undisturbed run, and each run that was killed."""
  place = folder / "place"
  place.mkdir()
  flags = os.environ["XLA_FLAGS"].replace("_device_count=8", "_device_count=1")  # See conftest.
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", _TRAINS, folder, str(kills), json.dumps(_PHASES), str(seed)],
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
  assert set(_PHASES) <= set(hit), f"a phase was never hit: {hit}"
  record_property("kills: training with images", hit.total())
  print(len(runs), "runs;", dict(hit))


def _phase(stage):
  return next((name for name, pattern in _PHASES.items() if re.match(pattern, stage)), "other")
