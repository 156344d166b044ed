"""Writes a table as a raw folder, whole or not at all, and finds what was written from the same table before."""

from collections.abc import Mapping
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from vixml_jax.datasets.bucket_sets import shared_sets
from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of, locked, new_folder, read_json_object, write_json
from vixml_jax.manifest import check_folder, write_manifest
from vixml_jax.remote import is_remote
from vixml_jax.tables.columns import FLAGS, Columns, find_columns
from vixml_jax.tables.label_names import LabelNames, Labels, LabelTable
from vixml_jax.tables.raw_writer import IMAGE_FILES, file_state, own_labels, write_labels, write_queries
from vixml_jax.tables.reading import read_first
from vixml_jax.tables.sources import SourcePart, open_source

RECORD = "conversion.json"
"""Name of the file that says what a folder was made from."""
TEST_FRACTION = 0.1
"""Share of the rows that are for testing, if the table does not say."""

_VERSION = 1  # Of the form of the folder; part of its fingerprint.
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Conversion:
  """A table that was written as a raw folder.

  Attributes:
    folder: The raw folder, for `dataset.raw_dir`.
    fingerprint: Hash of the contents of the table and of all settings.
    num_train: Number of training queries.
    num_test: Number of test queries.
    num_labels: Number of labels.
    num_images: Number of images of all of them.
    columns: The column of each role; "" for none.
    summary: Lines that say what each column was taken for, and how labels and rows were split.
  """

  folder: Path
  fingerprint: str
  num_train: int
  num_test: int
  num_labels: int
  num_images: int
  columns: Columns
  summary: tuple[str, ...]


def write_raw_folder(
  data: Any,
  to: str | os.PathLike[str],
  *,
  labels: Any = None,
  test: Any = None,
  columns: Columns | Mapping[str, str | None] | None = None,
  separator: str | None = None,
  test_fraction: float = TEST_FRACTION,
  seed: int = 0,
) -> Conversion:
  """Writes a table of texts and names of labels as a raw folder, which `vixml_jax.datasets` reads.

  Rows are read in batches, so that memory does not grow with texts and images: it holds the names of the labels, and
  for each row a few hashes. The same table with the same settings is written once.

  Example:
    >>> import tempfile
    >>> table = [{"text": "wool socks", "labels": ["socks", "wool"]}, {"text": "rain boots", "labels": ["boots"]}]
    >>> conversion = write_raw_folder(table, tempfile.mkdtemp() + "/raw")
    >>> conversion.num_train, conversion.num_test, conversion.num_labels
    (1, 1, 3)

  Args:
    data: Path of a CSV, TSV, JSON lines (all also `.gz`), Parquet or Arrow file; of a folder with several, which may be
      those of train and test; or of a folder that `datasets.save_to_disk` wrote. Or a pyarrow.Table, a pandas
      DataFrame, a Hugging Face Dataset, or a list of dicts.
    to: Folder to write. It must not exist, or have been written from the same table with the same settings.
    labels: Table of labels, like `data`: `uid` (or `id`, `name`, `label`), by which rows name a label, `text` (or
      `title`, ...), and optionally `content` and `images`. Without it, the name of a label is its text.
    test: Table of the test rows, like `data`, with the same columns.
    columns: Names of columns; names and contents decide about the others.
    separator: What separates the labels in a text, such as "|"; "" if each text is one label; None lets the cells
      decide.
    test_fraction: Share of the rows that are for testing, if neither files nor a column nor `test` say.
    seed: Seed of that choice.

  Returns:
    What was written or found.

  Raises:
    InputError: The table cannot be used; the message names file, line and column. Or `to` has something else.
  """
  return LabeledTable(data, labels, test, columns, separator, test_fraction, seed).write(Path(to))


def convert_shared(data_dir: str | os.PathLike[str], data: Any, **settings: Any) -> tuple[Conversion, str, str]:
  """Writes a table as the raw folder `NAME-HASH/raw` in a folder; tables that differ get different folders.

  Args:
    data_dir: Folder that holds those of all tables, or its URL in a bucket.
    data: As for `write_raw_folder`.
    **settings: The others.

  Returns:
    What was written, and the values of `dataset.raw_dir` and `dataset.data_dir`: paths, or URLs of the bucket.

  Raises:
    InputError: As for `write_raw_folder` and `shared_sets`.
  """
  table = LabeledTable(data, **settings)
  name = f"{table.name}-{table.fingerprint[:12]}"
  place = f"{data_dir}".rstrip("/") + f"/{name}" if is_remote(data_dir) else Path(data_dir) / name
  with shared_sets(place, "raw") as folder:
    converted = table.write(folder / "raw")
  raw_dir = f"{place}/raw" if is_remote(data_dir) else str(converted.folder)
  return converted, raw_dir, str(place)


class LabeledTable:
  """A table and all settings of its conversion; `write_raw_folder` describes the arguments.

  Attributes:
    name: Name of its file or folder without suffixes, or "table" in memory.
    fingerprint: Hash of the contents of the table and of all settings.
  """

  def __init__(
    self,
    data: Any,
    labels: Any = None,
    test: Any = None,
    columns: Columns | Mapping[str, str | None] | None = None,
    separator: str | None = None,
    test_fraction: float = TEST_FRACTION,
    seed: int = 0,
  ):
    """Opens the table.

    Raises:
      InputError: There is no such table, or a setting is wrong.
    """
    if not 0 < test_fraction < 1:
      raise InputError(f"--test_fraction={test_fraction}: must be above 0 and below 1")
    is_path = isinstance(data, str | os.PathLike)
    self.name = Path(data).resolve().name.partition(".")[0] or "table" if is_path else "table"
    self._columns = columns if isinstance(columns, Columns) else Columns(**(columns or {}))
    self._sources = _with_test(open_source(data, "the table"), test)
    if self._sources[0].split and self._columns.split:
      raise InputError(f"{FLAGS['split']}={self._columns.split}: the files are those of splits already; leave it out")
    self._labels = None if labels is None else open_source(labels, "the table of labels")
    self._separator, self._test_fraction, self._seed = separator, test_fraction, seed
    self.fingerprint = fingerprint_of(
      {
        "version": _VERSION,
        "parts": [[source.split, source.part.fingerprint()] for source in self._sources],
        "labels": [source.part.fingerprint() for source in self._labels or ()],
        "columns": dataclasses.asdict(self._columns),
        "settings": [separator, test_fraction, seed],
      }
    )

  def write(self, to: Path) -> Conversion:
    """Writes the raw folder, or finds it where it has been written before.

    Raises:
      InputError: The table cannot be used, or the folder has something else.
    """
    with locked(f"{to}.lock"):
      if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        return self._found(to)
      with new_folder(to) as work:
        conversion = self._write(work, to)
        write_json(work / RECORD, dataclasses.asdict(conversion) | {"folder": None})
        write_manifest(work)
    return conversion

  def _found(self, folder: Path) -> Conversion:
    """Returns what was written to a folder before."""
    if not (folder / RECORD).is_file():
      raise InputError(
        f"{folder}: has other files than those of a converted table; choose a folder that does not exist"
      )
    advice = f"delete {folder} and start the same command again"
    record = read_json_object(folder / RECORD, advice, advice)
    if record.get("fingerprint") != self.fingerprint:
      raise InputError(f"{folder}: was written from another table or with other settings; delete it, or choose another")
    check_folder(folder, advice, contents=False)
    with (folder / IMAGE_FILES).open(encoding="utf-8") as file:
      for state in map(json.loads, file):
        if file_state(Path(state[0])) != state:
          raise InputError(f"{folder}: image {state[0]} has changed since it was written; {advice}")
    summary, columns = tuple(record.pop("summary")), Columns(**record.pop("columns"))
    conversion = Conversion(**record | {"folder": folder}, columns=columns, summary=summary)
    _log.info("%s: found, as written from the same table before", folder)
    return conversion

  def _write(self, work: Path, to: Path) -> Conversion:
    """Writes all files to the folder `work`, which becomes `to`."""
    parts = [source.part for source in self._sources]
    roles = [role for role in FLAGS if role != "split" or not self._sources[0].split]
    columns, reasons = find_columns(self._columns, parts, roles)
    labels: Labels = LabelNames() if self._labels is None else LabelTable(self._labels)
    first = read_first(self._sources, columns, self._separator, self._test_fraction, self._seed)
    reasons["labels"] += f", {first.label_form}" if first.label_form else ""
    summary = [f"{role}: {reasons[role]}" for role in FLAGS if role in reasons and role != "split"]
    summary.append(f"split: {first.split_form}")
    if isinstance(labels, LabelTable):
      summary += [f"table of labels, {role}: {reason}" for role, reason in labels.reasons.items()]
    for line in summary:
      _log.info("%s", line)
    with (work / IMAGE_FILES).open("w", encoding="utf-8") as files:
      counts = write_queries(work, self._sources, columns, first, labels, files)
      counts["labels"] = write_labels(work, labels, files)
    own = own_labels(first.uids, labels)
    if own:
      _log.info(
        "%s queries have the uid of a label, so that they are taken for the same item: these pairs are not scored. "
        "If they are not, name no uids with --uid_column=",
        f"{own:,}",
      )
    return Conversion(
      folder=to,
      fingerprint=self.fingerprint,
      num_train=counts["train"]["rows"],
      num_test=counts["test"]["rows"],
      num_labels=counts["labels"]["rows"],
      num_images=sum(count["images"] for count in counts.values()),
      columns=columns,
      summary=tuple(summary),
    )


def _with_test(sources: list[SourcePart], test: Any) -> list[SourcePart]:
  """Returns the parts of a table with those of its test rows, if they are given.

  Raises:
    InputError: Both tables have test rows.
  """
  if test is None:
    # Files of training rows alone are a table that does not say which rows are for testing.
    only_train = {source.split for source in sources} == {"train"}
    return [SourcePart(source.part, "") for source in sources] if only_train else sources
  if {source.split for source in sources} - {"", "train"}:
    raise InputError(f"--test_data: {sources[0].part.name} has files of test rows already; give one of them")
  tests = open_source(test, "the table of test rows")
  if {source.split for source in tests} - {"", "test"}:
    raise InputError(f"--test_data: {tests[0].part.name} has files of several splits; give those of test rows only")
  return [
    *(SourcePart(source.part, "train") for source in sources),
    *(SourcePart(source.part, "test") for source in tests),
  ]
