"""Reads and writes `.npz` files in the format of big_vision: tensors by name, no pickle, bfloat16 as raw bytes."""

from collections.abc import Mapping, Sequence
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
    try:
      self._zip = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
      raise self._broken(error) from error

  def names(self) -> Sequence[str]:
    """Returns the names of all tensors. A name that occurs twice is listed twice."""
    return [name.removesuffix(".npy") for name in self._zip.namelist()]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without reading it."""
    try:
      with self._zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read_header(file)[0]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
      raise self._broken(error, name) from error

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor in its own dtype: float32, float16 or bfloat16.

    Raises:
      InputError: If the tensor is damaged or has another dtype.
    """
    try:
      with self._zip.open(f"{name}.npy") as file:
        tensor = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
      raise self._broken(error, name) from error
    if tensor.dtype == _RAW:
      tensor = tensor.view(_BFLOAT16)
    if tensor.dtype.name not in ("float32", "float16", "bfloat16"):
      raise InputError(
        f"{self.name}: tensor {name} is {tensor.dtype.name}; it must be float32, float16 or bfloat16: convert it"
      )
    return tensor

  def _broken(self, error: Exception, name: str = "") -> InputError:
    tensor = f" (tensor {name})" if name else ""
    return InputError(f"{self.name}: is not a complete npz file of plain arrays{tensor}: {error}; fetch it again")


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
