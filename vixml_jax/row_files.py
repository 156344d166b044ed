"""Rows of vectors in several `.npy` files, one for each share of the devices that hold them.

Share 3 of 16 of the rows "labels" is `labels-00003-of-00016.npy`. The rows of the files follow each other. A process
writes the shares that it holds, and no process needs memory for more than a block.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
import re

import numpy as np

from vixml_jax.array_file import ArrayFile
from vixml_jax.errors import InputError
from vixml_jax.files import new_file, sync_folder, writing

BLOCK_ROWS = 8192


def write_shares(
  folder: Path, name: str, dim: int, shares: Iterable[tuple[int, int, Iterable[np.ndarray]]], num_shares: int
) -> None:
  """Writes the shares of this process, float32; each file appears whole or not at all.

  Args:
    folder: Folder that exists.
    name: Name of the rows.
    dim: Width of the rows.
    shares: Number of each share, its first row, and its rows block by block.
    num_shares: Number of shares of all processes.
  """
  for number, _, blocks in shares:
    with (
      new_file(folder / f"{name}-{number:05d}-of-{num_shares:05d}.npy") as partial,
      ArrayFile(partial, np.float32, (dim,)) as file,
    ):
      for block in blocks:
        file.append(block)


def remove_shares(folder: Path, name: str) -> None:
  """Removes the shares of an earlier run, so that files of two runs are never mixed. Only one process may call this.

  Raises:
    InputError: The disk fails.
  """
  with writing(folder):
    for path in [*_shares(folder, name), folder / f"{name}.npy"]:  # Versions before 0.2 wrote one file.
      path.unlink(missing_ok=True)
    sync_folder(folder)


def save_rows(path: Path, rows: "np.ndarray | RowFiles") -> None:
  """Writes rows as one float32 array; those in files are copied block by block."""
  if isinstance(rows, np.ndarray):
    np.save(path, np.asarray(rows, np.float32))
    return
  with ArrayFile(path, np.float32, rows.shape[1:]) as file:
    for block in rows.blocks():
      file.append(block)


def load_rows(rows: "np.ndarray | RowFiles") -> np.ndarray:
  """Returns rows in memory, or memory-mapped, float32."""
  return np.asarray(rows if isinstance(rows, np.ndarray) else rows.load(), np.float32)


class RowFiles:
  """The rows [n, D] of all shares, read block by block.

  Attributes:
    shape: [n, D].
  """

  def __init__(self, folder: Path, name: str):
    """Reads the headers of the files.

    Raises:
      InputError: There is no such file, one is missing or damaged, or files of several runs are mixed.
    """
    self._paths = _shares(folder, name)
    if not self._paths:
      raise InputError(f"{folder}: contains no {name}-*.npy")
    wanted = int(self._paths[0].stem[-5:])
    for number in range(max(wanted, len(self._paths))):
      expected = folder / f"{name}-{number:05d}-of-{wanted:05d}.npy"
      if number >= len(self._paths) or self._paths[number] != expected:
        raise InputError(f"{expected}: is missing, or {folder} contains the {name} of several runs")
    self._lengths, self._offsets = [], []
    for path in self._paths:
      (length, dim), offset = _read_header(path)
      self._lengths.append(length)
      self._offsets.append(offset)
    self.shape = (sum(self._lengths), dim)

  def __len__(self) -> int:
    return self.shape[0]

  def blocks(self, size: int = BLOCK_ROWS) -> Iterator[np.ndarray]:
    """Yields the rows in order, float32 [at most size, D]."""
    for path, length, offset in zip(self._paths, self._lengths, self._offsets, strict=True):
      with path.open("rb") as file:
        file.seek(offset)
        for start in range(0, length, size):
          rows = min(size, length - start)
          block = np.fromfile(file, np.float32, rows * self.shape[1])
          if len(block) < rows * self.shape[1]:
            raise InputError(f"{path}: is cut off; evaluate again to write it")
          yield block.reshape(rows, self.shape[1])

  def load(self) -> np.ndarray:
    """Returns all rows; memory-mapped if they are in one file."""
    arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in self._paths]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _shares(folder: Path, name: str) -> list[Path]:
  pattern = re.compile(re.escape(name) + r"-\d{5}-of-\d{5}\.npy")
  return sorted(path for path in folder.glob(f"{name}-*.npy") if pattern.fullmatch(path.name))


def _read_header(path: Path) -> tuple[tuple[int, int], int]:
  """Returns the shape of an array, and the position of its first byte in the file."""
  try:
    with path.open("rb") as file:
      if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("unexpected version")
      shape, _, dtype = np.lib.format.read_array_header_1_0(file)
      if len(shape) != 2 or dtype != np.float32:
        raise ValueError(f"{dtype} of shape {shape} instead of float32 [rows, D]")
      return shape, file.tell()
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: cannot be read ({error}); evaluate again to write it") from error
