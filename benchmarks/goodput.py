"""Prints the goodput of a small run without kills, and with a SIGKILL every minute until it ends.

  python -m benchmarks.goodput --output=runs/goodput [--seconds=60] [--argument=--config.train.epochs=2 ...]

Each start loads its libraries, programs (from the cache on the disk) and checkpoint again, and repeats the steps since
this checkpoint. The goodput is the share of the wall time in which steps of the undisturbed run were trained.
"""

from collections.abc import Sequence
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from absl import app, flags

_MOST_KILLS = 30

_OUTPUT = flags.DEFINE_string("output", "runs/goodput", "Folder of the runs.")
_SECONDS = flags.DEFINE_float("seconds", 60.0, "Time from one start to its kill.")
_ARGUMENTS = flags.DEFINE_multi_string(
  "argument",
  [
    "--config=configs/quickstart.py:encoder=qwen2.5-tiny",
    "--config.train.epochs=3",
    "--config.checkpoint.every_steps=5",
    "--config.eval.blend=False",
    "--config.eval.baselines=()",
  ],
  "Argument of vixml_jax.main; give it once for each.",
)


def main(argv: Sequence[str]) -> None:
  """Runs both, and prints a line for each."""
  del argv
  output, useful = Path(_OUTPUT.value), 0.0
  output.mkdir(parents=True, exist_ok=True)
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(output.absolute() / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  _train(output / "first", None, environment)  # Fills the cache.
  for name, seconds in (("undisturbed", None), ("killed", _SECONDS.value)):
    started = time.monotonic()
    kills = _train(output / name, seconds, environment)
    wall = time.monotonic() - started
    counted = json.loads((output / name / "goodput.json").read_text())
    useful = counted["steps"] if seconds is None else useful
    print(
      f"{name}: goodput {useful / wall:.1%}; {kills} kills, {wall:.0f} s of wall time; goodput.json has "
      f"{sum(counted.values()):.0f} s, of which steps took {counted['steps']:.0f} s",
      flush=True,
    )


def _train(workdir: Path, seconds: float | None, environment: dict[str, str]) -> int:
  """Trains to the end, with a kill after so many seconds of each start; returns the number of kills."""
  kills = 0
  while True:
    command = [sys.executable, "-m", "vixml_jax.main", f"--workdir={workdir}", *_ARGUMENTS.value]
    with workdir.with_suffix(".log").open("a") as log:
      process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
      try:
        if process.wait(seconds):
          raise SystemExit(f"{workdir}: ended with status {process.returncode}; see {log.name}")
        return kills
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == _MOST_KILLS:
          raise SystemExit(f"{workdir}: has not ended after {kills} starts; raise --seconds") from None


if __name__ == "__main__":
  app.run(main)
