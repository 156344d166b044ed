"""Reads and writes folders of safetensors in the layout of Hugging Face."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
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
    self._file_of: dict[str, pathlib.Path] = {}
    for path in _weight_files(pathlib.Path(folder), stem):
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
          " bfloat16 are read (quantised weights have to be converted first)"
      )
    return tensor


def load_pretrained(
    folder: str | os.PathLike[str], table: Table, abstract: Mapping[str, Any]
) -> dict[str, Any]:
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
) -> None:
  """Writes `config.json` and `model.safetensors`, which `transformers.AutoModel` loads.

  Tensors that the table ignores (BERT's pooler) are not written.

  Args:
    params: nested dict of arrays, as `load_pretrained` returns it.
    folder: made if it does not exist.
    config: contents of `config.json`.
    table: of the architecture that `config` names.

  Raises:
    InputError: `config` is of another architecture, or parameters do not fit the table.
  """
  if config.get("model_type") != table.name:
    raise InputError(
        f"model_type is {config.get('model_type')!r} in the config to write to {folder}, but the"
        f" weights are those of a {table.name} model"
    )
  tensors = engine.invert(table, params)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / f"{_MODEL}{_ENDING}", metadata={"format": "pt"})  # transformers asks for this.
  (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _weight_files(folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
  single, index = folder / f"{stem}{_ENDING}", folder / f"{stem}{_INDEX_ENDING}"
  if single.is_file():
    return [single]
  if index.is_file():
    return _shards(index)
  if list(folder.glob("*.bin")):
    raise InputError(
        f"{folder}: only pickled weights (*.bin), which are not read; where transformers and torch"
        " are installed, write safetensors with: python -c 'from transformers import AutoModel;"
        f" AutoModel.from_pretrained(\"{folder}\").save_pretrained(\"{folder}\")'"
    )
  raise InputError(f"{folder}: holds neither {single.name} nor {index.name}; name a folder that does")


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  try:
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    paths = [index.parent / name for name in sorted(names)]
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise InputError(f"{index}: is not an index of safetensors ({error}); fetch it again") from error
  missing = [path.name for path in paths if not path.is_file()]
  if missing:
    raise InputError(f"{index}: names {', '.join(missing)}, not in the folder; fetch them again")
  return paths


def _open(path: pathlib.Path) -> Any:
  try:
    return safe_open(path, framework="numpy")
  except (OSError, SafetensorError) as error:
    raise InputError(f"{path}: is not a whole safetensors file ({error}); fetch it again") from error
