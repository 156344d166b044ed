"""Runs a synthetic set of the size of LF-AmazonTitles-1.3M from raw files to an index, and prints time and memory.

  .venv/bin/python benchmarks/synthetic_1_3m.py --output=RAW --title_words=1 --test_queries=4096
  .venv/bin/python benchmarks/full_size.py --raw_dir=RAW --output=OUT
  .venv/bin/python benchmarks/full_size.py --raw_dir=RAW --output=OUT2 --processes=2 --devices=4

The encoder has one narrow layer of 768 dimensions, so that a CPU can encode all rows. Every other part of a run has its
real size: 2,248,619 training queries, 1,305,265 labels, 65,536 free vectors. `main` trains one epoch, mines, evaluates
with and without retrieval augmentation and writes report and index; then `predict` and `add_labels` use the index. The
CPU is the device, so the memory of a process contains the arrays of its devices. With `--scale` of `synthetic_1_3m.py`
the same works for a part of the size, and `--processes` splits it over several processes.
"""

import argparse
from collections.abc import Sequence
import json
import os
from pathlib import Path
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np

_SETTINGS = {
  "dataset.max_length": 8,
  "encoder.num_layers": 1,
  "encoder.embed_dim": 768,
  "encoder.num_heads": 1,
  "encoder.num_kv_heads": 1,
  "encoder.mlp_dim": 64,
  "prototype.mlp_dim": 64,
  "train.epochs": 1,
  "train.batch_size": 2048,
  "train.row_length": 64,
  "train.chunk_rows": 256,
  "train.log_every_steps": 20,
  "mining.start_epoch": 0,
}
_DONE = re.compile(
  r"^\d\d:\d\d:\d\d (?P<stage>.*): done in (?P<seconds>[\d.]+) s; memory of the process: (?P<host>[\d.]+) GiB.*: "
  r"(?P<devices>[\d.]+) GiB$"
)


class _Watched:
  """A process whose output is kept and whose resident memory is sampled five times a second."""

  def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]):
    self.peak, self.started = 0, time.monotonic()
    self._log = log
    self._file = log.open("w", encoding="utf-8")
    self.process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.STDOUT, env=os.environ | environment)
    threading.Thread(target=self._watch, daemon=True).start()

  def _watch(self) -> None:
    path = Path(f"/proc/{self.process.pid}/statm")
    while self.process.poll() is None:
      try:
        self.peak = max(self.peak, int(path.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE"))
      except (OSError, IndexError):
        return
      time.sleep(0.2)

  def wait(self) -> float:
    """Returns the seconds that the process took; ends this program if it failed."""
    status = self.process.wait()
    self._file.close()
    if status:
      sys.exit(f"{self._log}: status {status}\n" + "\n".join(self.output().splitlines()[-20:]))
    return time.monotonic() - self.started

  def output(self) -> str:
    """Returns what the process has printed."""
    return self._log.read_text(encoding="utf-8")


def main() -> None:
  """Reads the flags and runs everything."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--raw_dir", type=Path, required=True, help="raw folder that synthetic_1_3m.py wrote")
  parser.add_argument("--output", type=Path, required=True, help="folder of the prepared data and the workdir")
  parser.add_argument("--processes", type=int, default=1, help="number of processes of main")
  parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
  parser.add_argument("--data_dir", type=Path, help="folder of the prepared data, to use it again")
  parser.add_argument("settings", nargs="*", help="further config keys, as KEY=VALUE")
  arguments = parser.parse_args()
  arguments.output.mkdir(parents=True, exist_ok=True)
  print(f"float32 products of 4096 x 4096: {matmul_rate():.0f} GFLOP/s", flush=True)
  workdir = arguments.output / "run"
  _train(arguments, workdir)
  _use_index(arguments.output, workdir)


def matmul_rate() -> float:
  """Returns the rate of float32 matrix products on this machine, in GFLOP/s."""
  square = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
  square @ square
  started = time.perf_counter()
  for _ in range(3):
    square @ square
  return 3 * 2 * 4096**3 / (time.perf_counter() - started) / 1e9


def _train(arguments: argparse.Namespace, workdir: Path) -> None:
  settings = _SETTINGS | {
    "dataset.raw_dir": arguments.raw_dir,
    "dataset.data_dir": arguments.data_dir or arguments.output / "data",
  }
  flags = [f"--config.{key}={value}" for key, value in settings.items()]
  flags += [f"--config.{setting}" for setting in arguments.settings]
  command = [sys.executable, "-m", "vixml_jax.main", "--config=configs/custom.py:encoder=qwen2.5-tiny"]
  command += [f"--workdir={workdir}", *flags]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={arguments.devices}",
    "TQDM_DISABLE": "1",
  }
  watched = []
  for number in range(arguments.processes):
    joined = [f"--coordinator=localhost:{port}", f"--num_processes={arguments.processes}", f"--process={number}"]
    own = command + (joined if arguments.processes > 1 else [])
    watched.append(_Watched(own, arguments.output / f"main-{number}.log", environment))
  for number, process in enumerate(watched):
    seconds = process.wait()
    print(f"main, process {number}: {seconds:.0f} s, peak RSS {process.peak / 2**30:.2f} GiB")
  print("\n| stage | seconds | peak RSS so far, GiB | arrays on devices at its end, GiB |\n|---|---|---|---|")
  for line in watched[0].output().splitlines():
    if found := _DONE.match(line):
      print(f"| {found['stage']} | {found['seconds']} | {found['host']} | {found['devices']} |")
  print("\n".join(watched[0].output().splitlines()[-8:]))
  metrics = json.loads((workdir / "final_metrics.json").read_text(encoding="utf-8"))
  print({name: metrics[name] for name in ("P@1", "P@5", "R@100", "RA/P@1", "RA/R@100", "train_seconds")}, flush=True)


def _use_index(output: Path, workdir: Path) -> None:
  """Answers queries from the index, adds labels to it, and answers again."""
  queries, labels = output / "queries.jsonl", output / "new.jsonl"
  queries.write_text("".join(f'{{"uid": "q{i}", "title": "arrow"}}\n' for i in range(100)), encoding="utf-8")
  labels.write_text('{"uid": "new/1", "title": "arrow"}\n{"uid": "new/2", "title": "cloud"}\n', encoding="utf-8")
  predict = ["predict", f"--queries={queries}", "--k=10"]
  for number, (name, *flags) in enumerate(
    (
      [*predict, f"--output={output / 'top.jsonl'}"],
      [*predict, f"--output={output / 'augmented.jsonl'}", "--retrieval_augmented"],
      ["add_labels", f"--labels={labels}"],
      [*predict, f"--output={output / 'after.jsonl'}"],
    )
  ):
    command = [sys.executable, "-m", f"vixml_jax.{name}", f"--workdir={workdir}", *flags]
    process = _Watched(command, output / f"{number}-{name}.log", {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"})
    seconds = process.wait()
    print(f"{name} {flags[-1]}: {seconds:.0f} s, peak RSS {process.peak / 2**30:.2f} GiB", flush=True)
    print("  " + "\n  ".join(process.output().splitlines()[-3:]))
  first = json.loads((output / "after.jsonl").read_text(encoding="utf-8").splitlines()[0])
  print("first answer after add_labels:", json.dumps(first)[:400])


if __name__ == "__main__":
  main()
