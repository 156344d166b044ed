"""Measures `predict` on a large file, with one process and with two that are killed and continued by one.

  python -m benchmarks.predict_processes --workdir=runs/quickstart --queries=1000000

Queries are random words of the labels' uids. The file is answered twice: by one process; and by two that get SIGKILL
when 40 % of the blocks are finished, after which one process continues. The script prints seconds, queries per second
and the peak memory of each process, and whether both results are the same to the last bit.
"""

from collections.abc import Sequence
import dataclasses
import filecmp
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

from absl import flags
import numpy as np

from vixml_jax import cli
from vixml_jax.errors import InputError
from vixml_jax.search.label_index import LabelIndex

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Trained workdir.")
_QUERIES = flags.DEFINE_integer("queries", 1_000_000, "Number of queries.")
_OUTPUT = flags.DEFINE_string("output", "runs/predict_processes", "Folder of the queries and the results.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4096, "Queries of a block.")
_KILLED_AT = flags.DEFINE_float("killed_at", 0.4, "Share of finished blocks at which processes are killed.")
_ARGUMENTS = flags.DEFINE_multi_string(
  "argument", ["--ranking=plain", "--encoder=int8"], "Argument of vixml_jax.predict; give it once for each."
)

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Measured:
  """What some processes that ran together took.

  Attributes:
    seconds: Wall time from their start to the end of the last one.
    gib: Peak memory of each process, in GiB.
    blocks: Number of blocks that were finished at the end.
  """

  seconds: float
  gib: list[float]
  blocks: int


def write_queries(path: Path, words: Sequence[str], count: int) -> None:
  """Writes titles of one to five random words."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 6, count)
  chosen = np.split(rng.integers(0, len(words), lengths.sum()), np.cumsum(lengths)[:-1])
  with path.open("w") as file:
    file.writelines(json.dumps({"title": " ".join(words[index] for index in row)}) + "\n" for row in chosen)


def finished_blocks(result: Path) -> int:
  """Returns the number of blocks of a result that are finished and recorded."""
  return sum(1 for _ in result.parent.glob(f"{result.name}.partial/*/done/[0-9]*"))


def run(command: Sequence[str], result: Path, processes: int, kill_at: int | None = None) -> Measured:
  """Runs processes of `predict` to their end, or kills them all when `kill_at` blocks are finished.

  Raises:
    SystemExit: A process failed.
  """
  started, log = time.monotonic(), result.with_suffix(".log")
  with log.open("a") as output:
    share = [] if processes == 1 else [f"--num_processes={processes}"]
    running = [
      subprocess.Popen([*command, *share, *([f"--process={i}"] if share else [])], stdout=output, stderr=output)
      for i in range(processes)
    ]
    blocks = 0
    if kill_at is not None:
      while (blocks := finished_blocks(result)) < kill_at and all(_runs(process) for process in running):
        time.sleep(_POLL_SECONDS)
      for process in running:
        process.send_signal(signal.SIGKILL)
    memory, failed = [], False
    for process in running:
      _, status, usage = os.wait4(process.pid, 0)
      process.returncode = os.waitstatus_to_exitcode(status)
      memory.append(usage.ru_maxrss / 2**20)
      # A short run may end before it is killed.
      failed |= process.returncode != 0 and (kill_at is None or process.returncode != -signal.SIGKILL)
  if failed:
    sys.exit(f"a process of predict failed; see {log}")
  return Measured(time.monotonic() - started, memory, blocks)


def _runs(process: subprocess.Popen[bytes]) -> bool:
  """Returns whether a process has not ended; its status is left for `os.wait4`."""
  return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main() -> None:
  """Runs both and prints what they took."""
  output = Path(_OUTPUT.value)
  if output.exists() and any(output.iterdir()):
    raise InputError(f"--output={output} is not empty, and results there would be continued; remove it")
  index = LabelIndex.open(Path(_WORKDIR.value) / "index", checkpoint=None)
  uids = " ".join(index.uids(np.arange(index.num_labels)))
  words = sorted(set(re.findall(r"[a-z]+", uids.lower())))
  output.mkdir(parents=True, exist_ok=True)
  queries, count = output / "queries.jsonl", _QUERIES.value
  write_queries(queries, words, count)
  predict = [sys.executable, "-m", "vixml_jax.predict", f"--workdir={_WORKDIR.value}", f"--queries={queries}"]
  predict += [f"--batch_size={_BATCH_SIZE.value}", *_ARGUMENTS.value]

  results = [output / f"{name}.jsonl" for name in ("one", "killed")]
  commands = [[*predict, f"--output={result}"] for result in results]
  print(f"{count:,} queries, {len(words):,} words, {queries.stat().st_size / 2**20:.0f} MiB", flush=True)
  _show("one process", run(commands[0], results[0], 1), count)
  kill_at = int(_KILLED_AT.value * -(-count // _BATCH_SIZE.value))
  killed = run(commands[1], results[1], 2, kill_at)
  _show(f"two processes, killed after {killed.blocks} blocks", killed, killed.blocks * _BATCH_SIZE.value)
  _show("continued by one process", run(commands[1], results[1], 1), count - killed.blocks * _BATCH_SIZE.value)
  same = filecmp.cmp(*results, shallow=False)
  print("both results are the same" if same else "THE RESULTS DIFFER", flush=True)
  sys.exit(not same)


def _show(name: str, measured: Measured, queries: int) -> None:
  memory = ", ".join(f"{gib:.2f}" for gib in measured.gib)
  rate = queries / measured.seconds
  print(f"{name}: {measured.seconds:.1f} s, {rate:,.0f} queries/s, GiB of each process at most: {memory}", flush=True)


if __name__ == "__main__":
  cli.run(main)
