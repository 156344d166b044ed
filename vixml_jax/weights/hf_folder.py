"""Reads and writes folders of safetensors in the format of Hugging Face."""

from collections.abc import Mapping, Sequence
import json
import math
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vixml_jax.errors import InputError
from vixml_jax.weights import engine
from vixml_jax.weights.folder_files import ENDING, INDEX_ENDING, MODEL, weight_files
from vixml_jax.weights.tables import Table

_DTYPES = ("F32", "F16", "BF16")
_DTYPE_NAMES = {"F64": "float64", "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8"}


class SafetensorsFolder:
  """The tensors of a folder: `model.safetensors`, or the files that `model.safetensors.index.json` lists.

  Files are opened for each read and closed again, because the pages that have been read of an open file count as memory
  of the process.

  Args:
    folder: Folder with the files.
    stem: Name of the files, without the endings.

  Attributes:
    name: Path of the folder, for messages.

  Raises:
    InputError: If the folder has no such files, or one is damaged or missing.
  """

  def __init__(self, folder: str | os.PathLike[str], stem: str = MODEL):
    self.name = str(folder)
    self._names: list[str] = []
    self._shapes: dict[str, tuple[int, ...]] = {}
    self._file_of: dict[str, Path] = {}
    for path in weight_files(Path(folder), stem):
      with _open(path) as file:
        for name in list(file.keys()):
          self._names.append(name)
          self._shapes[name] = tuple(file.get_slice(name).get_shape())
          self._file_of[name] = path

  def names(self) -> Sequence[str]:
    """Returns the names of all tensors. A name that occurs in two files is listed twice."""
    return self._names

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without reading it."""
    return self._shapes[name]

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor in its own dtype: float32, float16 or bfloat16.

    Raises:
      InputError: If the file is damaged or the tensor has another dtype.
    """
    return self.read_window(name, ())

  def read_window(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
    """Reads a window of a tensor, given by one slice per dimension; nothing else is copied from the file."""
    path = self._file_of[name]
    with _open(path) as file:
      found = file.get_slice(name)
      if found.get_dtype() not in _DTYPES:  # Of others, numpy has no type for some (FP8).
        raise InputError(
          f"{path}: tensor {name} is {_DTYPE_NAMES.get(found.get_dtype(), found.get_dtype())}; it must be float32, "
          "float16 or bfloat16: convert quantized weights first"
        )
      return found[window] if window else file.get_tensor(name)


def load_pretrained(folder: str | os.PathLike[str], table: Table, abstract: Mapping[str, Any]) -> dict[str, Any]:
  """Reads a Hugging Face folder into our parameters; see `engine.apply`.

  Args:
    folder: Folder with `model.safetensors`, or with `model.safetensors.index.json` and its files.
    table: Table of the folder's architecture.
    abstract: Nested dict of arrays or ShapeDtypeStructs with the shapes and dtypes of the parameters.

  Returns:
    Nested dict of numpy arrays.

  Raises:
    InputError: If the folder has no safetensors, a file is damaged, or the weights do not fit exactly.
  """
  return engine.apply(table, SafetensorsFolder(folder), abstract)


def save_pretrained(
  params: Mapping[str, Any],
  folder: str | os.PathLike[str],
  config: Mapping[str, Any],
  table: Table,
  dtype: str | None = None,
  max_shard_bytes: int = 5 * 10**9,
  zeros: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
  """Writes `config.json` and the weights as safetensors, which `transformers.AutoModel` loads.

  Weights of more than `max_shard_bytes` are written to several files with an index. At most one file is held in memory.
  Of the tensors that the table ignores, such as BERT's pooler, only those in `zeros` are written.

  Args:
    params: Nested dict of arrays as `load_pretrained` returns it, or of objects that `engine.Inverse` accepts.
    folder: Folder to write to. It is created if it does not exist.
    config: Contents of `config.json`.
    table: Table of the architecture that `config` names.
    dtype: Dtype of all tensors in the files; None to keep the dtypes of the parameters.
    max_shard_bytes: Maximum number of bytes of a file, unless one tensor has more.
    zeros: Names and shapes of further tensors, which are written as zeros.

  Raises:
    InputError: If `config` is for another architecture, or the parameters do not fit the table.
  """
  if config.get("model_type") != table.name:
    raise InputError(
      f"{folder}: model_type is {config.get('model_type')!r} in the config to write, but the weights are those of a "
      f"{table.name} model; pass the config of that model"
    )
  source = engine.Inverse(table, params)
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  _write_shards(source, zeros, folder, dtype, max_shard_bytes)
  (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _write_shards(
  source: engine.Inverse, zeros: Mapping[str, tuple[int, ...]], folder: Path, dtype: str | None, max_bytes: int
) -> None:
  """Writes one file, or several files and their index, in the format of Hugging Face."""
  size = np.dtype(dtype or np.float32).itemsize  # Without `dtype`, no tensor is wider than float32.
  shards: list[list[str]] = []
  free = 0
  for name in (*source.names(), *zeros):
    needed = math.prod(zeros[name] if name in zeros else source.shape(name)) * size
    if needed > free:
      shards.append([])
      free = max_bytes
    shards[-1].append(name)
    free -= needed
  files = (
    [f"{MODEL}{ENDING}"]
    if len(shards) == 1
    else [f"{MODEL}-{number:05}-of-{len(shards):05}{ENDING}" for number in range(1, len(shards) + 1)]
  )
  total = 0
  for file, names in zip(files, shards, strict=True):
    tensors = {name: np.zeros(zeros[name], np.float32) if name in zeros else source.read(name) for name in names}
    if dtype is not None:
      tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    total += sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, folder / file, metadata={"format": "pt"})  # transformers requires this.
  if len(files) > 1:
    index = {
      "metadata": {"total_size": total},
      "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / f"{MODEL}{INDEX_ENDING}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open(path: Path) -> Any:
  try:
    return safe_open(path, framework="numpy")
  except (OSError, SafetensorError) as error:
    raise InputError(f"{path}: is not a complete safetensors file ({error}); fetch it again") from error
