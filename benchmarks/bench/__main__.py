"""Runs the rows of the comparison, and prints and writes the table after each; see `benchmarks.bench`."""

import argparse
import os
from pathlib import Path
import sys
import threading

# Idle threads of torch, faiss and numba sleep; otherwise they occupy the cores during the turn of another side.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# JAX and torch share the memory of a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# All sides use one GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Every model is made here; nothing is fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.bench import harness, report, rows

_ROUNDS = {"tiny": 1, "cpu": 5, "gpu": 5}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
  """Returns the flags."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of bench.txt and bench.json")
  parser.add_argument("--rows", default="", help="rows to run, separated by commas; by default all of the size")
  parser.add_argument("--size", choices=rows.SIZES, help="size of the work; by default that of the machine")
  parser.add_argument("--rounds", type=int, help="timed rounds of each row; by default 5")
  parser.add_argument("--minutes", type=float, help="end the run after this time; rounds are left out before rows are")
  parser.add_argument("--list", action="store_true", help="list the rows and end")
  flags = parser.parse_args(arguments)
  unknown = [name for name in flags.rows.split(",") if name and name not in rows.NAMES]
  if unknown:
    parser.error(f"--rows={flags.rows}: no row {', '.join(unknown)}; choose among {', '.join(rows.NAMES)}")
  if flags.rounds is not None and flags.rounds < 1:
    parser.error(f"--rounds={flags.rounds}: must be at least 1")
  return flags


def main(arguments: list[str] | None = None) -> int:
  """Runs the rows; returns 1 if a side failed or its answer differs, else 0."""
  flags = parse_arguments(arguments)
  if flags.list:
    for name in rows.NAMES:
      print(f"{name:20}{rows.first_line(name)}")
    return 0
  clock = harness.Clock(flags.minutes)
  import jax

  from benchmarks.bench.limits import Limits

  size = flags.size or ("cpu" if jax.default_backend() == "cpu" else "gpu")
  rounds = flags.rounds or _ROUNDS[size]
  names = [name for name in flags.rows.split(",") if name] or rows.names_of(size)
  machine, limits = report.machine_facts(size, rounds, flags.minutes), Limits(size)
  results: list[harness.RowResult] = []
  _end_in_time(clock, flags.minutes)
  print(report.summary(machine), report.heading(), sep="\n", flush=True)
  for number, name in enumerate(names):
    if clock.left() <= 0:
      results.append(harness.RowResult(name, problem="not run: no time was left"))
    else:
      share = clock.left() / (len(names) - number)
      results.append(harness.run_row(name, rows.maker(name, size), rounds, share, limits.rate))
    print(*report.table_lines(results[-1]), sep="\n", flush=True)
    _free_memory()
    report.write(flags.output, results, limits.found, machine, len(results) == len(names))
  print("", *report.descriptions(results, limits.found), f"written to {flags.output}", sep="\n", flush=True)
  return int(any(row.failed for row in results))


def _end_in_time(clock: harness.Clock, minutes: float | None) -> None:
  """Ends the process when the time is over, also in the middle of a call that cannot be interrupted."""
  if minutes is None:
    return

  def end() -> None:
    print(f"ended after {minutes:g} minutes; the rows so far are written", flush=True)
    os._exit(1)

  timer = threading.Timer(max(clock.left(), 0.0), end)
  timer.daemon = True
  timer.start()


def _free_memory() -> None:
  """Drops compiled programs, and the memory of a GPU that torch keeps for later."""
  import jax

  jax.clear_caches()
  torch = sys.modules.get("torch")
  if torch is not None:
    if hasattr(torch, "compiler"):
      torch.compiler.reset()
    if torch.cuda.is_available():
      torch.cuda.empty_cache()


if __name__ == "__main__":
  sys.exit(main())
