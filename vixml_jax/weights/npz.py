"""Reads and writes `.npz` files in the format of big_vision: tensors by name, no pickle, bfloat16 as raw bytes."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
import os
from pathlib import Path
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import new_file

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_RAW = np.dtype("V2")  # numpy has no bfloat16 and saves one as two raw bytes.
# Weights can hardly be compressed. A file that claims to hold more was made to fill the memory.
_MAX_RATIO, _SMALL = 32, 1 << 20


class NpzFile:
  """The tensors of an `.npz` file, which are read from disk one at a time.

  Args:
    path: The file.

  Attributes:
    name: Path of the file, for messages.

  Raises:
    InputError: If the file cannot be read or is not an npz file.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.name = str(path)
    with self._reading():
      self._zip = zipfile.ZipFile(path)
      packed = Path(path).stat().st_size
      unpacked = sum(member.file_size for member in self._zip.infolist())
      if unpacked > _MAX_RATIO * packed + _SMALL:
        raise ValueError(f"{packed:,} bytes claim to hold {unpacked:,}")

  def names(self) -> Sequence[str]:
    """Returns the names of all tensors. A name that occurs twice is listed twice."""
    return [name.removesuffix(".npy") for name in self._zip.namelist()]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without reading it.

    Raises:
      InputError: If its header is damaged, or its size is not that of its bytes.
    """
    with self._reading(name), self._zip.open(f"{name}.npy") as file:
      version = np.lib.format.read_magic(file)
      read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
      shape, _, dtype = read_header(file)
      # Nothing is allocated for a size that only the header has.
      stored = self._zip.getinfo(f"{name}.npy").file_size - file.tell()
      if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != stored:
        raise ValueError(f"{stored:,} bytes are not the size of shape {list(shape)!s:.80}")
    return shape

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor in its own dtype: float32, float16 or bfloat16.

    Raises:
      InputError: If the tensor is damaged or has another dtype.
    """
    self.shape(name)
    with self._reading(name), self._zip.open(f"{name}.npy") as file:
      tensor = np.lib.format.read_array(file, allow_pickle=False)
    if tensor.dtype == _RAW:
      tensor = tensor.view(_BFLOAT16)
    if tensor.dtype.name not in ("float32", "float16", "bfloat16"):
      raise InputError(
        f"{self.name}: tensor {name} is {tensor.dtype.name}; it must be float32, float16 or bfloat16: convert it"
      )
    return tensor

  @contextlib.contextmanager
  def _reading(self, name: str = "") -> Iterator[None]:
    """Turns every error of the block into an `InputError`: zipfile and numpy raise almost any for damaged bytes."""
    try:
      yield
    except Exception as error:
      tensor = f" (tensor {name:.200})" if name else ""
      reason = " ".join(str(error).split()) or type(error).__name__
      raise InputError(
        f"{self.name}: is not a complete npz file of plain arrays{tensor}: {reason:.200}; fetch it again"
      ) from error


def write_npz(tensors: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
  """Writes arrays by name. Equal arrays give equal bytes. An existing file is replaced atomically.

  Args:
    tensors: Arrays of float32, float16 or bfloat16.
    path: The file. Its folder is created if it does not exist.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {}
  for name, tensor in tensors.items():
    array = np.asarray(tensor)
    arrays[name] = array.view(_RAW) if array.dtype == _BFLOAT16 else array
  with new_file(path) as work, work.open("wb") as file:
    np.savez(file, **arrays)
