"""Trains napkinXC's probabilistic label trees and ranks queries by them, in a process of its own.

napkinXC is C++ code, and an error in it ends the process that called it. Here that is not the process of the
evaluation. The two exchange plain arrays in a temporary folder.

This module is also the program of that process: `python -m vixml_jax.evaluation.label_trees FOLDER`.
"""

import importlib
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import scipy.sparse

from vixml_jax.errors import InputError, install_command
from vixml_jax.ragged import Ragged

_RANKED = "ranked.npy"


class TreesFailedError(Exception):
  """The process that trains label trees has ended without a result; the message says how."""


def rank_by_label_trees(
  train: scipy.sparse.csr_array, labels: Ragged, test: scipy.sparse.csr_array, width: int
) -> np.ndarray:
  """Returns ids of the best labels of each test query, int32 [T, width], filled up with -1.

  Args:
    train: Vectors of training queries [N, F].
    labels: Their labels, N rows, none of which is empty.
    test: Vectors of test queries [T, F].
    width: Number of labels.

  Raises:
    TreesFailedError: The process has died, or napkinXC has raised an error.
  """
  with tempfile.TemporaryDirectory() as folder:
    _write(Path(folder), train, labels, test, width)
    found_here = os.pathsep.join(path for path in sys.path if path)  # The other process must find the same packages.
    done = subprocess.run(  # nosec B603 - this Python and this module; no shell.
      [sys.executable, "-m", __name__, folder],
      env=os.environ | {"PYTHONPATH": found_here},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      errors="replace",
    )
    if done.returncode:
      raise TreesFailedError(_how_it_ended(done.returncode, done.stderr))
    return np.load(Path(folder) / _RANKED, allow_pickle=False)


def napkinxc_models() -> Any:
  """Returns the module `napkinxc.models`.

  Raises:
    InputError: It cannot be imported; the message has the command that installs it.
  """
  try:
    return importlib.import_module("napkinxc.models")
  except ImportError as error:
    raise InputError(
      f"the baseline plt needs the package napkinxc, which cannot be imported ({error}): "
      f"{install_command('baselines')}, or leave plt out of config.eval.baselines"
    ) from error


def _how_it_ended(status: int, stderr: str) -> str:
  """Describes the exit status of a process: the signal that ended it, or the last line of its error."""
  if status < 0:
    try:
      return f"it was ended by {signal.Signals(-status).name}"
    except ValueError:  # Real-time signals have no names.
      return f"it was ended by signal {-status}"
  lines = stderr.strip().splitlines()
  return f"it failed with {lines[-1]!r}" if lines else f"it ended with status {status}"


def _write(
  folder: Path, train: scipy.sparse.csr_array, labels: Ragged, test: scipy.sparse.csr_array, width: int
) -> None:
  """Writes what the other process reads."""
  for name, matrix in (("train", train), ("test", test)):
    scipy.sparse.save_npz(folder / f"{name}.npz", scipy.sparse.csr_matrix(matrix), compressed=False)
  np.savez(folder / "labels.npz", values=labels.values, offsets=labels.offsets, width=width)


def _train_and_rank(folder: Path) -> None:
  """Trains label trees with their default settings, and writes the ranking of the test queries."""
  train, test = _read_matrix(folder / "train.npz"), _read_matrix(folder / "test.npz")
  # Each classifier is trained in an array of all columns, and most columns of hashed words are empty.
  used = np.unique(train.indices)
  train, test = train[:, used], test[:, used]
  with np.load(folder / "labels.npz", allow_pickle=False) as arrays:
    labels, width = Ragged(arrays["values"], arrays["offsets"]), int(arrays["width"])
  model = napkinxc_models().PLT(str(folder / "plt"), seed=0)
  # napkinXC takes the last label of a row for its largest one, and writes beyond its arrays if it is not.
  model.fit(train, [sorted(labels[row].tolist()) for row in range(len(labels))])
  ids = np.full((test.shape[0], width), -1, np.int32)
  for row, found in enumerate(model.predict(test, top_k=width)):
    ids[row, : len(found)] = found
  np.save(folder / _RANKED, ids, allow_pickle=False)


def _read_matrix(path: Path) -> scipy.sparse.csr_matrix:
  """Returns a matrix in the form that napkinXC takes, with columns in ascending order."""
  matrix = scipy.sparse.csr_matrix(scipy.sparse.load_npz(path))
  matrix.sort_indices()
  return matrix


if __name__ == "__main__":
  _train_and_rank(Path(sys.argv[1]))
