"""Prepares a data set once and opens it again, refusing data made from other raw files."""

import logging
import os
from pathlib import Path

import tensorflow_datasets as tfds

from vixml_jax.datasets import builders, building, raw
from vixml_jax.errors import InputError
from vixml_jax.files import locked

_log = logging.getLogger(__name__)
_EMBEDDED = {"mm_icons_9k": Path(__file__).parent / "mm_icons_9k"}


def prepare(name: str, raw_dir: str | os.PathLike | None, data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
  """Builds a data set from its raw files unless that has been done, and opens it.

  Args:
    name: a key of `builders.BUILDERS`, e.g. `lf_amazon_titles_131k` or `custom`.
    raw_dir: folder with the raw files. None or "" stands for the files in this package (embedded
      sets) or for data that are prepared already.
    data_dir: folder for all prepared data; it is made when missing.

  Returns:
    The builder, ready for `as_data_source`. `info.metadata` holds `sha256` of the raw files by
    name, `counts` by split and `text_fields`.

  Raises:
    InputError: unknown name, missing or malformed raw files, or prepared data that come from
      other raw files than those in `raw_dir`.
  """
  builder_class = _builder_class(name)
  folder = Path(raw_dir) if raw_dir else _EMBEDDED.get(name)
  with locked(Path(data_dir) / f"{name}.lock"):
    target = _folder(name, data_dir)
    if target.is_dir():
      if folder is not None:
        _check_same_files(name, folder, target, data_dir)
      return open_dataset(name, data_dir)
    if folder is None:
      raise InputError(
        f"{name} has not been prepared in {data_dir}: set --config.dataset.raw_dir to the "
        "folder with its raw files (trn.json.gz, tst.json.gz, lbl.json.gz, ...)"
      )
    raw.check_folder(folder)
    building.remove_leftovers(target)
    builder = builder_class(data_dir=data_dir)
    _log.info("preparing %s from %s", name, folder)
    building.build(builder, data_dir, folder)
    builder = open_dataset(name, data_dir)
    counts = builder.info.metadata["counts"]
    _log.info("prepared %s in %s: %s", name, target, ", ".join(f"{count:,} {split}" for split, count in counts.items()))
    return builder


def open_dataset(name: str, data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
  """Opens what `prepare` made.

  Raises:
    InputError: unknown name, or nothing has been prepared.
  """
  _builder_class(name)
  target = _folder(name, data_dir)
  if not (target / "dataset_info.json").is_file():
    raise InputError(f"{target}: no prepared data set; run python -m vixml_jax.prepare_data first")
  return tfds.builder_from_directory(target)


def _builder_class(name: str) -> type[builders.RawFolder]:
  if name not in builders.BUILDERS:
    raise InputError(f"unknown data set '{name}'; known are {', '.join(builders.BUILDERS)}")
  return builders.BUILDERS[name]


def _folder(name: str, data_dir: str | os.PathLike) -> Path:
  return Path(data_dir) / name / str(builders.BUILDERS[name].VERSION)


def _check_same_files(name: str, folder: Path, target: Path, data_dir: str | os.PathLike) -> None:
  raw.check_folder(folder)
  prepared = open_dataset(name, data_dir).info.metadata["sha256"]
  found = raw.sha256_of_files(folder)
  changed = sorted(n for n in prepared.keys() | found.keys() if prepared.get(n) != found.get(n))
  if changed:
    raise InputError(
      f"{target}: was prepared from other raw files than those in {folder} "
      f"({', '.join(changed)} differ); delete it to prepare these, or set another "
      "--config.dataset.data_dir"
    )
