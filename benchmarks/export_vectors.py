"""Measures the memory and time of `vixml export --format=label-vectors` at the size of LF-AmazonTitles-1.3M.

  .venv/bin/python -m benchmarks.export_vectors --folder=FOLDER [--labels=1305265] [--dims=384,768] [--dtype=float32]

For each number of dimensions, a workdir with random unit vectors and made-up texts is written, and a process of its own
exports it. Its memory is the largest resident one, with what Python and the libraries take; mapped files count as well.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
import shutil
import subprocess
import sys
import time

import numpy as np

from vixml_jax.array_file import ArrayFile
from vixml_jax.exporting.formats import DTYPES_OF

_BLOCK = 1 << 16
_HELD_OUT = 100
_STEP = 1
_EXPORT = "--export="  # The flag of the process that exports.


def main() -> None:
  """Writes workdirs, exports them, and prints a line for each."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=Path, required=True, help="folder for workdirs, which are removed again")
  parser.add_argument("--labels", type=int, default=1_305_265)
  parser.add_argument("--dims", default="384,768")
  parser.add_argument("--dtype", default="float32", choices=DTYPES_OF["label-vectors"])
  parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.export is not None:
    export(arguments.export, arguments.dtype)
    return
  for dim in map(int, arguments.dims.split(",")):
    workdir = arguments.folder / f"{arguments.labels}x{dim}"
    write_workdir(workdir, arguments.labels, dim)
    print(f"{arguments.labels:,} labels x {dim} ({arguments.labels * dim * 4 / 1e9:.2f} GB in float32): ", end="")
    sys.stdout.flush()
    command = [sys.executable, "-m", "benchmarks.export_vectors", f"--folder={arguments.folder}"]
    subprocess.run([*command, f"{_EXPORT}{workdir}", f"--dtype={arguments.dtype}"], check=True)
    shutil.rmtree(workdir)


def export(workdir: Path, dtype: str) -> None:
  """Exports the vectors of a workdir, and prints the memory of this process."""
  from vixml_jax.exporting.label_vectors import LABELS, write_label_vectors

  folder, before, started = workdir / "vectors", _peak_mib(), time.monotonic()
  folder.mkdir()
  write_label_vectors(workdir, folder, dtype)
  peak, seconds = _peak_mib(), time.monotonic() - started
  print(
    f"peak RSS {peak:,.0f} MiB, of which {before:,.0f} MiB before the export; {seconds:.0f} s; "
    f"{LABELS} has {(folder / LABELS).stat().st_size / 1e9:.2f} GB"
  )


def _peak_mib() -> float:
  """Returns the largest resident memory of this program. That of `getrusage` includes the process that started it."""
  (line,) = (line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith("VmHWM:"))
  return int(line.split()[1]) / 1024


def write_workdir(workdir: Path, labels: int, dim: int) -> None:
  """Writes what the export reads: a checkpoint, whose model is of no interest, and a label index."""
  import jax.numpy as jnp

  from vixml_jax.run.checkpoint import Checkpoint, Checkpointer, checkpoint_id
  from vixml_jax.run.state import TrainState
  from vixml_jax.run.workdir import CHECKPOINTS, INDEX
  from vixml_jax.search.label_index_files import IndexContents, write_index
  from vixml_jax.search.text_table import TextTable

  workdir.mkdir(parents=True)
  one = jnp.zeros(1)
  with Checkpointer(workdir / CHECKPOINTS, 1) as checkpointer:
    checkpointer.save(_STEP, Checkpoint(TrainState(one, {"encoder": {"bias": one}}, one, one, one, one), None, {}))
  rng, made = np.random.default_rng(0), workdir / "made.npy"
  with ArrayFile(made, np.float32, (dim,)) as file:
    for block in _blocks(labels):
      rows = rng.normal(size=(len(block), dim)).astype(np.float32)
      file.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
  vectors = np.load(made, mmap_mode="r")
  contents = IndexContents(
    vectors,
    TextTable.from_blocks([f"title of label {i}, of some words" for i in block] for block in _blocks(labels)),
    TextTable.from_blocks([f"B{i:09}" for i in block] for block in _blocks(labels)),
    np.zeros(labels, np.int32),
    np.zeros((1, dim), np.float32),
    held_out=np.asarray(vectors[:_HELD_OUT]),
  )
  write_index(workdir / INDEX, contents, checkpoint=checkpoint_id(workdir / CHECKPOINTS, _STEP), search="exact")
  made.unlink()


def _blocks(count: int) -> Iterator[range]:
  return (range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


if __name__ == "__main__":
  main()
