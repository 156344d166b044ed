"""Finds the parts of a table: one file, several files in a folder, a saved Hugging Face data set, or data in memory."""

from collections.abc import Sequence
import os
from pathlib import Path
import re
from typing import Any, NamedTuple

import pyarrow as pa

from vixml_jax.errors import InputError
from vixml_jax.files import read_json_object
from vixml_jax.record_files import bounded_lines, open_packed
from vixml_jax.remote import local_table
from vixml_jax.tables.parts import ArrowPart, CsvPart, JsonLinesPart, Part, RecordsPart

SPLITS = {
  "train": ("train", "training", "trn"),
  "test": ("test", "testing", "tst"),
  "validation": ("validation", "valid", "val", "dev"),
}
"""Names that a split may have, in small letters."""

FILES = "CSV, TSV or JSON lines (.csv, .tsv, .jsonl, also .gz), Parquet (.parquet) or Arrow (.arrow)"
_SPLIT_OF_NAME = {name: split for split, names in SPLITS.items() for name in names}
_ORDER = ("train", "validation", "test", "")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow")
_WORD = re.compile(r"[a-z]+")
_HF_STATE, _HF_DICT = "state.json", "dataset_dict.json"


class SourcePart(NamedTuple):
  """A part of a table and the split that its rows belong to; "" if the part does not say."""

  part: Part
  split: str


def split_named(name: str) -> str | None:
  """Returns "train", "test" or "validation" for a name of a split; None for another name.

  >>> split_named("Dev"), split_named("trn"), split_named("unsupervised")
  ('validation', 'train', None)
  """
  return _SPLIT_OF_NAME.get(name.strip().lower())


def open_source(data: Any, name: str) -> list[SourcePart]:
  """Opens a table.

  Args:
    data: Path of a file or a folder, or its URL in a bucket; or a pyarrow.Table, a pandas DataFrame, a Hugging Face
      Dataset, another object with Arrow's `__arrow_c_stream__`, or a list of dicts.
    name: Name of data in memory, in messages.

  Returns:
    The parts: those for training first, and within a split by name. Either all of them have a split, or none.

  Raises:
    InputError: There are no such files, or they cannot be read.
  """
  if isinstance(data, str | os.PathLike):
    path = local_table(os.fspath(data))
    if path.is_dir():
      return sorted(_folder(path), key=lambda source: _ORDER.index(source.split))
    if not path.is_file():
      raise InputError(f"{path}: no such file or folder; give a table as {FILES}")
    return [SourcePart(_file(path), "")]
  return [SourcePart(_in_memory(data, name), "")]


def table_suffix(path: Path) -> str:
  """Returns the suffix of a file that can be a table, without `.gz`; "" for another file."""
  name = path.name.lower().removesuffix(".gz")
  suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
  packed = path.name.lower().endswith(".gz")
  return "" if packed and suffix in (".parquet", ".arrow") else suffix


def _file(path: Path) -> Part:
  suffix = table_suffix(path)
  if not suffix:
    raise InputError(f"{path}: tables are {FILES}; convert or rename it")
  if path.stat().st_size == 0:
    raise InputError(f"{path}: is empty; it must have at least one row")
  if suffix in (".csv", ".tsv"):
    return CsvPart(path, "\t" if suffix == ".tsv" else _delimiter(path))
  return JsonLinesPart(path) if suffix in (".jsonl", ".ndjson") else ArrowPart(path, str(path))


def _delimiter(path: Path) -> str:
  """Returns the delimiter of a .csv file: a comma, unless its header has none but a semicolon or a tab."""
  with open_packed(path) as file:
    header = next(bounded_lines(file, path), b"")
  return next((mark for mark in (",", ";", "\t") if mark.encode() in header), ",")


def _in_memory(data: Any, name: str) -> Part:
  if isinstance(data, pa.RecordBatch):
    data = pa.Table.from_batches([data])
  if isinstance(data, Sequence) and not isinstance(data, str | bytes):
    return RecordsPart(data, name)
  try:
    library = type(data).__module__.partition(".")[0]
    if library == "datasets" and hasattr(data, "with_format"):
      data = data.with_format("arrow")[:].replace_schema_metadata(data.features.arrow_schema.metadata)
    elif library == "pandas":
      data = pa.Table.from_pandas(data, preserve_index=False)
    elif not isinstance(data, pa.Table) and hasattr(data, "__arrow_c_stream__"):
      data = pa.table(data)
  except (pa.ArrowException, TypeError, ValueError) as error:
    raise InputError(f"{name}: is not a table that Arrow can hold ({' '.join(map(str, error.args))})") from error
  if isinstance(data, pa.Table):
    return ArrowPart(data, name)
  raise InputError(
    f"{name}: is {type(data).__name__}; it must be a path, a pyarrow.Table, a pandas DataFrame, a Hugging Face Dataset "
    "or a list of dicts"
  )


def _folder(folder: Path) -> list[SourcePart]:
  if (folder / _HF_DICT).is_file():
    return _hf_dict(folder)
  if (folder / _HF_STATE).is_file():
    return [SourcePart(part, "") for part in _hf_dataset(folder)]
  inner = {path: split for path in sorted(folder.iterdir()) if path.is_dir() and (split := split_named(path.name))}
  files = _table_files(folder)
  if inner and not files:
    return [SourcePart(_file(path), split) for place, split in inner.items() for path in _table_files(place)]
  if not files:
    raise InputError(
      f"{folder}: has no table and no saved data set; tables are {FILES}, and a raw folder has trn.json.gz, "
      "tst.json.gz and lbl.json.gz"
    )
  suffixes = sorted({table_suffix(path) for path in files})
  if len(suffixes) > 1:
    raise InputError(f"{folder}: has tables of several kinds ({', '.join(suffixes)}); give one file, or keep one kind")
  splits = [split_named(match[0]) if (match := _WORD.match(path.name.lower())) else None for path in files]
  if any(splits) and not all(splits):
    other = files[splits.index(None)]
    raise InputError(
      f"{other}: is neither of train nor of test, as other files of its folder are; rename or move it (a table of "
      "labels is named by --labels_table)"
    )
  return [SourcePart(_file(path), split or "") for path, split in zip(files, splits, strict=True)]


def _table_files(folder: Path) -> list[Path]:
  return [
    path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] not in "._" and table_suffix(path)
  ]


def _hf_dict(folder: Path) -> list[SourcePart]:
  """Returns the parts of a `DatasetDict` that `save_to_disk` wrote."""
  names = read_json_object(folder / _HF_DICT, "save it again", "save it again").get("splits")
  if not isinstance(names, list) or not names:
    raise InputError(f"{folder / _HF_DICT}: names no splits; save the data set again")
  unknown = [name for name in names if split_named(str(name)) is None]
  if unknown and len(names) > 1:
    raise InputError(
      f"{folder}: has a split {unknown[0]!r}; splits are train, validation and test: give the folder of one split, or "
      "save the data set without this one"
    )
  return [
    SourcePart(part, "" if len(names) == 1 else split_named(name) or "")
    for name in names
    for part in _hf_dataset(folder / name)
  ]


def _hf_dataset(folder: Path) -> list[Part]:
  """Returns the Arrow files of a `Dataset` that `save_to_disk` wrote, in order."""
  state = read_json_object(folder / _HF_STATE, "save it again", "save it again")
  if state.get("_indices_data_files"):
    raise InputError(f"{folder}: has indices besides its rows; save data_set.flatten_indices() instead")
  try:
    files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
  except (KeyError, TypeError) as error:
    raise InputError(f"{folder / _HF_STATE}: names no data files; save the data set again") from error
  missing = next((path for path in files if not path.is_file()), None)
  if missing or not files:
    raise InputError(f"{missing or folder / _HF_STATE}: no such Arrow file; save the data set again")
  return [ArrowPart(path, str(path)) for path in files]
