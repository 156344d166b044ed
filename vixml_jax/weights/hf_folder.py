"""Reads and writes folders of safetensors in the layout of Hugging Face."""

from collections.abc import Mapping, Sequence
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vixml_jax.errors import InputError
from vixml_jax.weights import engine
from vixml_jax.weights.tables import Table

_MODEL = "model"  # What the weights' files are called, without the endings.
_ENDING = ".safetensors"
_INDEX_ENDING = ".safetensors.index.json"


class SafetensorsFolder:
  """The tensors of a folder: `model.safetensors`, or the files that `model.safetensors.index.json` names.

  No file stays open, as what has been read of it would count to the process's memory for as long.

  Args:
    folder: holds the files.
    stem: what they are called instead of `model`.

  Attributes:
    name: the folder, for messages.
  """

  def __init__(self, folder: str | os.PathLike[str], stem: str = _MODEL):
    self.name = str(folder)
    self._names: list[str] = []
    self._shapes: dict[str, tuple[int, ...]] = {}
    self._file_of: dict[str, Path] = {}
    for path in _weight_files(Path(folder), stem):
      with _open(path) as file:
        for name in list(file.keys()):
          self._names.append(name)
          self._shapes[name] = tuple(file.get_slice(name).get_shape())
          self._file_of[name] = path

  def names(self) -> Sequence[str]:
    """Names of all tensors; one that stands in two files is listed twice."""
    return self._names

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it."""
    return self._shapes[name]

  def read(self, name: str) -> np.ndarray:
    """The tensor, in its own dtype (f32, f16 or bf16)."""
    with _open(self._file_of[name]) as file:
      return self._checked(name, file.get_tensor(name))

  def read_window(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
    """What stands in a window of the tensor, one slice a dimension; nothing else is copied from the file."""
    with _open(self._file_of[name]) as file:
      return self._checked(name, file.get_slice(name)[window])

  def _checked(self, name: str, tensor: np.ndarray) -> np.ndarray:
    if tensor.dtype.name not in ("float32", "float16", "bfloat16"):
      raise InputError(
        f"{self._file_of[name]}: tensor {name} is {tensor.dtype.name}; float32, float16 and"
        " bfloat16 are read (quantized weights have to be converted first)"
      )
    return tensor


def load_pretrained(folder: str | os.PathLike[str], table: Table, abstract: Mapping[str, Any]) -> dict[str, Any]:
  """Reads a Hugging Face folder into our parameters; see `engine.apply`.

  Args:
    folder: holds `model.safetensors` or `model.safetensors.index.json` with its files.
    table: of the folder's architecture.
    abstract: nested dict of arrays or ShapeDtypeStructs, for the shapes and dtypes wanted.

  Returns:
    Nested dict of numpy arrays.

  Raises:
    InputError: no safetensors there, a damaged file, or weights that do not fit exactly.
  """
  return engine.apply(table, SafetensorsFolder(folder), abstract)


def save_pretrained(
  params: Mapping[str, Any],
  folder: str | os.PathLike[str],
  config: Mapping[str, Any],
  table: Table,
  dtype: str | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes `config.json` and the weights as safetensors, which `transformers.AutoModel` loads.

  Weights of more than `max_shard_bytes` become several files with an index; no more than one file's worth is held
  in memory. Tensors that the table ignores (BERT's pooler) are not written.

  Args:
    params: nested dict of arrays, as `load_pretrained` returns it, or of what `engine.Inverse` takes.
    folder: made if it does not exist.
    config: contents of `config.json`.
    table: of the architecture that `config` names.
    dtype: of all tensors in the files; None for their own.
    max_shard_bytes: most bytes in a file, unless one tensor has more.

  Raises:
    InputError: `config` is of another architecture, or parameters do not fit the table.
  """
  if config.get("model_type") != table.name:
    raise InputError(
      f"model_type is {config.get('model_type')!r} in the config to write to {folder}, but the"
      f" weights are those of a {table.name} model"
    )
  source = engine.Inverse(table, params)
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  _write_shards(source, folder, dtype, max_shard_bytes)
  (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _write_shards(source: engine.Inverse, folder: Path, dtype: str | None, max_bytes: int) -> None:
  """One file, or several and their index, in the layout of Hugging Face."""
  size = np.dtype(dtype or np.float32).itemsize  # Without `dtype` no tensor is wider than f32.
  shards: list[list[str]] = []
  free = 0
  for name in source.names():
    needed = math.prod(source.shape(name)) * size
    if needed > free:
      shards.append([])
      free = max_bytes
    shards[-1].append(name)
    free -= needed
  files = (
    [f"{_MODEL}{_ENDING}"]
    if len(shards) == 1
    else [f"{_MODEL}-{number:05}-of-{len(shards):05}{_ENDING}" for number in range(1, len(shards) + 1)]
  )
  total = 0
  for file, names in zip(files, shards, strict=True):
    tensors = {name: source.read(name) for name in names}
    if dtype is not None:
      tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    total += sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, folder / file, metadata={"format": "pt"})  # transformers asks for this.
  if len(files) > 1:
    index = {
      "metadata": {"total_size": total},
      "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / f"{_MODEL}{_INDEX_ENDING}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weight_files(folder: Path, stem: str) -> list[Path]:
  single, index = folder / f"{stem}{_ENDING}", folder / f"{stem}{_INDEX_ENDING}"
  if single.is_file():
    return [single]
  if index.is_file():
    return _shards(index)
  if list(folder.glob("*.bin")):
    raise InputError(
      f"{folder}: only pickled weights (*.bin), which are not read; where transformers and torch"
      " are installed, write safetensors with: python -c 'from transformers import AutoModel;"
      f' AutoModel.from_pretrained("{folder}").save_pretrained("{folder}")\''
    )
  raise InputError(f"{folder}: holds neither {single.name} nor {index.name}; name a folder that does")


def _shards(index: Path) -> list[Path]:
  try:
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    paths = [index.parent / name for name in sorted(names)]
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise InputError(f"{index}: is not an index of safetensors ({error}); fetch it again") from error
  missing = [path.name for path in paths if not path.is_file()]
  if missing:
    raise InputError(f"{index}: names {', '.join(missing)}, not in the folder; fetch them again")
  return paths


def _open(path: Path) -> Any:
  try:
    return safe_open(path, framework="numpy")
  except (OSError, SafetensorError) as error:
    raise InputError(f"{path}: is not a whole safetensors file ({error}); fetch it again") from error
