"""Prepares a data set from its raw files once, opens it again, and refuses it if the raw files have changed."""

from collections.abc import Callable
import contextlib
import io
import logging
import os
from pathlib import Path
import shutil

import tensorflow_datasets as tfds

from vixml_jax.datasets import builders, raw
from vixml_jax.errors import InputError
from vixml_jax.files import locked, new_folder
from vixml_jax.manifest import MANIFEST, check_folder, write_manifest

_log = logging.getLogger(__name__)
EMBEDDED = {"mm_icons_9k": Path(__file__).parent / "mm_icons_9k"}
"""Folders of the raw files in this package, by the name of the data set."""


def prepare(
  name: str, raw_dir: str | os.PathLike[str] | None, data_dir: str | os.PathLike[str], allow_empty_filter: bool = False
) -> tfds.core.DatasetBuilder:
  """Builds a data set from its raw files if that has not been done, and opens it.

  Args:
    name: Key of `builders.BUILDERS`, such as `lf_amazon_titles_131k` or `custom`.
    raw_dir: Folder with the raw files or with archives of them, or an archive; see `raw.find_files`. None or "" stands
      for the files in this package (embedded data sets) or for data that have been prepared.
    data_dir: Folder for all prepared data. It is created if it does not exist.
    allow_empty_filter: Accept a filter file without pairs for a set where queries are labels.

  Returns:
    The builder, ready for `as_data_source`. Its `info.metadata` has `sha256` of the raw files by name, `counts` of
    rows by split, `text_fields`, and `filters` (see `filters.RawFilters.metadata`).

  Raises:
    InputError: The name is unknown, raw files are missing or malformed, the prepared data were built from other raw
      files than those in `raw_dir` or are damaged, or the disk is full.
  """
  builder_class = _builder_class(name)
  folder = Path(raw_dir) if raw_dir else EMBEDDED.get(name)
  with locked(Path(data_dir) / f"{name}.lock"):
    target = _folder(name, data_dir)
    if target.is_dir():
      if folder is not None:
        _check_same_files(name, folder, target, data_dir)
      return open_dataset(name, data_dir)
    if folder is None:
      raise InputError(
        f"{name} has not been prepared in {data_dir}: set --config.dataset.raw_dir to the folder with its raw files "
        "or archives (trn.json.gz, tst.json.gz, lbl.json.gz, ...; see docs/data.md)"
      )
    raw.find_files(folder)  # Before TFDS creates folders.
    _log.info("preparing %s from %s", name, folder)

    def make(data_dir: Path) -> tfds.core.DatasetBuilder:
      unprepared = builder_class(data_dir=data_dir)
      unprepared.raw_dir, unprepared.allow_empty_filter = folder, allow_empty_filter
      return unprepared

    build(make, target)
    builder = open_dataset(name, data_dir)
    counts = builder.info.metadata["counts"]
    _log.info("prepared %s in %s: %s", name, target, ", ".join(f"{count:,} {split}" for split, count in counts.items()))
    return builder


def open_dataset(name: str, data_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
  """Opens a data set that `prepare` has built.

  Raises:
    InputError: The name is unknown, or the data set has not been prepared or is damaged.
  """
  _builder_class(name)
  target = _folder(name, data_dir)
  if not target.is_dir():
    raise InputError(f"{target}: no prepared data set; run python -m vixml_jax.prepare_data first")
  return open_folder(target)


def build(make: Callable[[Path], tfds.core.DatasetBuilder], target: Path) -> None:
  """Runs a TFDS builder of this package without its messages and downloads. Only one process may do so at a time.

  The folder of the data set appears when all files are on the disk, with their hashes.

  Args:
    make: Returns a builder that writes below the folder that it receives.
    target: Folder of the data set.
  """
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  tfds.disable_progress_bar()  # The builders of this package show bars with known totals.
  with new_folder(target) as work:
    builder = make(work / "build")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads.
      builder.download_and_prepare(
        download_dir=work / "build" / "downloads", download_config=config, file_format="array_record"
      )
    for path in Path(builder.data_path).iterdir():
      path.rename(work / path.name)
    shutil.rmtree(work / "build")
    write_manifest(work)


def open_folder(folder: Path) -> tfds.core.DatasetBuilder:
  """Opens a folder that `build` has written.

  The sizes of all files are compared with the manifest, and the sha256 of the small ones that describe the others.
  array_record compares the hash of each part of the others that is read.

  Raises:
    InputError: A file is missing or damaged.
  """
  if (folder / MANIFEST).exists():
    check_folder(folder, _remedy(folder), contents=False, and_contents_of=lambda name: name.endswith(".json"))
  else:
    _log.info("%s: was written by a version that stored no hashes, so it is not checked", folder)
  try:
    builder = tfds.builder_from_directory(folder)
    if builder.info.metadata is None:
      raise ValueError("metadata.json is missing")
  except Exception as error:  # TFDS raises whatever its parsers raise.
    raise InputError(f"{folder}: cannot be read ({error!r}); {_remedy(folder)}") from error
  return builder


def check_contents(builder: tfds.core.DatasetBuilder) -> None:
  """Compares all files of a prepared data set with their sha256, before something is made from them that is kept.

  Raises:
    InputError: A file is missing or damaged.
  """
  folder = Path(builder.data_path)
  if (folder / MANIFEST).exists():
    check_folder(folder, _remedy(folder), contents=True)


def _remedy(folder: Path) -> str:
  return f"delete {folder} and start the same command again, which makes it again"


def changed_files(prepared: dict[str, str], found: dict[str, str]) -> list[str]:
  """Returns the sorted names of the files that differ between two dicts of name to sha256."""
  return sorted(name for name in prepared.keys() | found.keys() if prepared.get(name) != found.get(name))


def _builder_class(name: str) -> type[builders.RawFolder]:
  if name not in builders.BUILDERS:
    raise InputError(f"unknown data set '{name}'; choose from {', '.join(builders.BUILDERS)}")
  return builders.BUILDERS[name]


def _folder(name: str, data_dir: str | os.PathLike[str]) -> Path:
  return Path(data_dir) / name / str(builders.BUILDERS[name].VERSION)


def _check_same_files(name: str, folder: Path, target: Path, data_dir: str | os.PathLike[str]) -> None:
  files = raw.find_files(folder)
  prepared = open_dataset(name, data_dir).info.metadata["sha256"]
  changed = changed_files(prepared, raw.sha256_of_files(files))
  if changed:
    raise InputError(
      f"{target}: was prepared from other raw files than those in {folder} ({', '.join(changed)} differ); delete it to "
      "prepare these, or set another --config.dataset.data_dir"
    )
