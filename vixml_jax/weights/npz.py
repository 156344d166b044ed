"""Reads and writes `.npz` files in the layout of big_vision: tensors by name, no pickle, bf16 as raw pairs of bytes."""

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from vixml_jax.errors import InputError

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_RAW = np.dtype("V2")  # numpy has no bf16: it saves one as two bytes without a meaning.


class NpzFile:
  """The tensors of an `.npz` file, read from disk one at a time.

  Attributes:
    name: the file, for messages.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.name = str(path)
    try:
      self._zip = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
      raise self._broken(error) from error

  def names(self) -> Sequence[str]:
    """Names of all tensors; one that stands there twice is listed twice."""
    return [name.removesuffix(".npy") for name in self._zip.namelist()]

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it."""
    try:
      with self._zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read_header(file)[0]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
      raise self._broken(error, name) from error

  def read(self, name: str) -> np.ndarray:
    """The tensor, in its own dtype (f32, f16 or bf16)."""
    try:
      with self._zip.open(f"{name}.npy") as file:
        tensor = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
      raise self._broken(error, name) from error
    if tensor.dtype == _RAW:
      tensor = tensor.view(_BFLOAT16)
    if tensor.dtype.name not in ("float32", "float16", "bfloat16"):
      raise InputError(f"{self.name}: tensor {name} is {tensor.dtype.name}; float32, float16 and bfloat16 are read")
    return tensor

  def _broken(self, error: Exception, name: str = "") -> InputError:
    tensor = f" (tensor {name})" if name else ""
    return InputError(f"{self.name}: is not a whole npz file of plain arrays{tensor}: {error}; fetch it again")


def write_npz(tensors: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
  """Writes arrays by name; the same arrays make the same bytes. An existing file is replaced at once.

  Args:
    tensors: arrays of f32, f16 or bf16.
    path: the file; its folder is made if it does not exist.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {}
  for name, tensor in tensors.items():
    array = np.asarray(tensor)
    arrays[name] = array.view(_RAW) if array.dtype == _BFLOAT16 else array
  work = path.with_name(f"{path.name}.incomplete")
  with work.open("wb") as file:
    np.savez(file, **arrays)
  work.replace(path)
