"""Training runs with images that are killed: `python -m tests.faults.killed_runs FOLDER KILLS SEED`.

The process has imported everything, and forks. A child trains and reports its stages. It is killed when it is told to
be, and another child continues. Each line of stdout is a JSON object: first the undisturbed run, then each run that
was killed.
"""

from collections.abc import Callable
import hashlib
import importlib
import json
import os
from pathlib import Path
import random
import re
import shutil
import signal
import sys
import time
import traceback
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.helpers.trained_workdirs import with_tower
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.run import configuration
from vixml_jax.stages import Callback, Stage, reporting

PHASES = {
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

# What a run imports when it needs it. Imported before the forks, since every child would take seconds.
_IMPORTED_LATE = ("lightgbm", "scipy.sparse", "sklearn.feature_extraction.text")


class _Phase(NamedTuple):
  """A kill in a phase: after `count` stages that match `pattern` have begun, and `delay` seconds more."""

  pattern: str
  count: int
  delay: float


class _Attempt(NamedTuple):
  """What a child did.

  Attributes:
    status: Exit status; the negative number of the signal that killed it.
    open_stages: Names of the stages in progress when it ended.
    summary: What `_summary` returned in it; None if it did not come so far.
    seconds: Seconds from its start to its end.
    stages: Name and second of the start of each stage.
  """

  status: int
  open_stages: list[str]
  summary: dict[str, Any] | None
  seconds: float
  stages: list[tuple[str, float]]


class _Reports(Callback):
  """Writes the start and the end of each stage to stdout."""

  def on_stage(self, stage: Stage) -> None:
    if stage.ended or not stage.seconds:
      os.write(1, f"{'end' if stage.ended else 'start'} {stage.name}\n".encode())


def _write_config(place: Path) -> None:
  config = with_tower(place, images=2)
  config.train.epochs, config.checkpoint.every_steps, config.eval.every_epochs = 3, 2, 2
  config.eval.update(dict(test_images=(), retrieval_choose=False, blend=True))
  configuration.write(config, place / "config.json")


def _train(place: Path) -> None:
  with reporting(_Reports()):
    train_and_evaluate(configuration.read(place / "config.json"), place / "run")
  os.write(1, f"done {json.dumps(_summary(place / 'run'))}\n".encode())


def _summary(run: Path) -> dict[str, Any]:
  """Returns everything that must be the same after any kills: arrays, metrics and the label index."""
  step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
  with ocp.PyTreeCheckpointer() as reader:
    found: dict[str, Any] = {
      item: _hashes(reader.restore(run / "checkpoints" / str(step) / item)) for item in ("model", "training", "mining")
    }
  final = json.loads((run / "final_metrics.json").read_text())
  found["final"] = {key: value for key, value in final.items() if key not in ("train_seconds", "tokens_per_second")}
  found["metrics"] = []
  for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
    values = {} if line["split"] == "goodput" else line["values"]
    found["metrics"].append(
      [line["step"], line["epoch"], line["split"], {k: v for k, v in values.items() if k != "train_seconds"}]
    )
  (index,) = [path for path in (run / "index").iterdir() if path.is_dir()]
  found["index"] = {
    path.relative_to(index).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(index.rglob("*"))
    if path.is_file() and path.name != "index.json"
  }
  described = json.loads((index / "index.json").read_text())
  found["index"]["index.json"] = {key: value for key, value in described.items() if key != "checkpoint"}
  found["step"] = step
  return found


def _hashes(tree: Any) -> dict[str, str]:
  return {
    jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _start(work: Callable[[Path], None], place: Path) -> tuple[int, TextIO]:
  """Does `work` in a fork. Returns its process id, and its stdout."""
  read, write = os.pipe()
  child = os.fork()
  if child:
    os.close(write)
    return child, os.fdopen(read)
  os.dup2(write, 1)
  try:
    work(place)
  except BaseException:
    traceback.print_exc()
    os._exit(1)
  os._exit(0)


def _attempt(place: Path, kill: _Phase | float | None, work: Callable[[Path], None] = _train) -> _Attempt:
  """Does `work` in a fork, which is killed in a phase, or after a number of seconds."""
  began, open_stages, stages, summary = time.monotonic(), [], [], None
  child, lines = _start(work, place)
  if isinstance(kill, float):
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, kill)
  matched = 0
  for line in lines:
    word, _, name = line.rstrip().partition(" ")
    if word == "done":
      summary = json.loads(name)
    elif word == "start":
      open_stages.append(name)
      stages.append((name, time.monotonic() - began))
      if isinstance(kill, _Phase) and re.match(kill.pattern, name):
        matched += 1
        if matched == kill.count:
          time.sleep(kill.delay)
          os.kill(child, signal.SIGKILL)
    elif name in open_stages:
      open_stages.remove(name)
  signal.setitimer(signal.ITIMER_REAL, 0)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  return _Attempt(status, open_stages, summary, time.monotonic() - began, stages)


def _report(**values: Any) -> None:
  print(json.dumps(values), flush=True)


def _empty(place: Path) -> None:
  """Removes everything that a run wrote."""
  for folder in ("run", "data"):
    shutil.rmtree(place / folder)


def _plans(rng: random.Random, seconds: float):
  """Yields the kills of one run after another: in a few phases in their order, and at random seconds, in turn."""
  while True:
    order = rng.sample(range(len(PHASES)), len(PHASES))
    for first in range(0, len(order), 4):
      yield [
        _Phase(list(PHASES.values())[i], rng.choice([1, 1, 2]), rng.choice([0, rng.random() * 0.2]))
        for i in sorted(order[first : first + 4])
      ]
      yield [rng.random() * seconds for _ in range(3)]


def main(place: Path, kills: int, seed: int) -> None:
  """Trains without a kill, and then again and again with kills. Reports each run."""
  rng = random.Random(seed)
  for name in _IMPORTED_LATE:
    importlib.import_module(name)
  _attempt(place, None, _write_config)
  if kills >= len(PHASES):  # Compiles everything, so that the next run tells how long one takes.
    _attempt(place, None)
    _empty(place)
  undisturbed = _attempt(place, None)
  expected = undisturbed.summary or {}
  _report(seconds=undisturbed.seconds, stages=undisturbed.stages, status=undisturbed.status)
  plans = _plans(rng, undisturbed.seconds)
  done, number, missing = 0, 0, list(PHASES.values()) if kills >= len(PHASES) else []
  while done < kills or (missing and number < kills):
    _empty(place)
    if done < kills:
      plan = next(plans)[: kills - done]
    else:  # Some phases take milliseconds, and the kills so far have missed them.
      plan = [_Phase(pattern, rng.choice([1, 2, 3, 4]), 0) for pattern in missing[:4]]
    hit = []
    for kill in [*plan, None]:
      found = _attempt(place, kill)
      if found.status != -signal.SIGKILL:
        break
      hit.append(found.open_stages[-1] if found.open_stages else "between stages")
      missing = [pattern for pattern in missing if not re.match(pattern, hit[-1])]
    done += len(hit)
    summary = found.summary or {}
    wrong = [key for key in expected if summary.get(key) != expected[key]]
    _report(run=number, hit=hit, status=found.status, wrong=wrong)
    if wrong and summary:
      _report(expected={key: expected[key] for key in wrong}, found={key: summary[key] for key in wrong})
    number += 1


if __name__ == "__main__":
  main(Path(sys.argv[1]) / "place", int(sys.argv[2]), int(sys.argv[3]))
