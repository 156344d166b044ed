"""Flags of a table to train from, which the entry points that prepare data share.

An entry point calls `define_data_flags` when it is imported. absl lists the flags in its `--help`, because this module
disclaims them. What reads tables is imported when it is used: `--help` takes no time.
"""

from collections.abc import Sequence
import dataclasses
import logging
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vixml_jax.errors import InputError
from vixml_jax.run.workdir import CONFIG

flags.disclaim_key_flags()

DEFAULT_CONFIG = "custom"
"""Config of a command with `--data` and without `--config`."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataFlags:
  """Flags of a table; `define_data_flags` defines them."""

  data: flags.FlagHolder[str | None]
  test_data: flags.FlagHolder[str | None]
  labels_table: flags.FlagHolder[str | None]
  label_separator: flags.FlagHolder[str | None]
  test_fraction: flags.FlagHolder[float | None]
  columns: dict[str, flags.FlagHolder[str | None]]

  def set_raw_dir(self, config: ConfigDict, workdir: Path | None = None) -> None:
    """Writes the table as a raw folder, if that has not been done, and sets the config to it.

    The folder is written below `dataset.data_dir`, which is set to a folder of this table, so that several tables can
    be prepared. A folder in the raw format becomes `dataset.raw_dir` itself. Without `--data`, nothing changes.

    Args:
      config: The whole config.
      workdir: Folder of the run; None for commands without one.

    Raises:
      InputError: The table cannot be used, flags do not fit, or the run in the workdir was started with other data.
    """
    from vixml_jax.datasets.raw import is_raw
    from vixml_jax.remote import local_table

    given = {flag.name: flag.value for flag in self._others() if flag.value is not None}
    if self.data.value is None:
      if given:
        raise InputError(f"--{next(iter(given))}: needs --data, the table that it belongs to")
      return
    if config.dataset.raw_dir:
      raise InputError("--data and --config.dataset.raw_dir: both name the data; give one of them")
    folder = local_table(self.data.value)
    if is_raw(folder):
      if given:
        raise InputError(f"--{next(iter(given))}: {self.data.value} is in the raw format, not a table; leave it out")
      config.dataset.raw_dir = str(folder)
      return
    self._convert(config)
    if workdir is not None:
      _check_same_table(config.dataset.raw_dir, workdir)

  def _convert(self, config: ConfigDict) -> None:
    from vixml_jax.tables import Columns, convert_shared

    settings: dict[str, Any] = {} if self.test_fraction.value is None else {"test_fraction": self.test_fraction.value}
    separator = self.label_separator.value
    converted, raw_dir, data_dir = convert_shared(
      config.dataset.data_dir,
      self.data.value,
      labels=self.labels_table.value,
      test=self.test_data.value,
      columns=Columns(**{role: flag.value for role, flag in self.columns.items()}),
      separator="\t" if separator == r"\t" else separator,
      **settings,
    )
    config.dataset.name = "custom"
    config.dataset.raw_dir, config.dataset.data_dir = raw_dir, data_dir
    if converted.columns.content and "content" not in config.dataset.text_fields:
      _log.info(
        "column %r is stored and not read: to read it, set --config.dataset.text_fields=title,content and "
        "--config.dataset.max_length",
        converted.columns.content,
      )
    if converted.num_images and not config.images:
      _log.info(
        "%s images are stored and not read: to read them, see docs/data.md (--config=configs/custom.py:images=3)",
        f"{converted.num_images:,}",
      )

  def _others(self) -> list[flags.FlagHolder[Any]]:
    return [self.test_data, self.labels_table, self.label_separator, self.test_fraction, *self.columns.values()]


def define_data_flags() -> DataFlags:
  """Defines `--data`, and the flags that say how to read it."""
  return DataFlags(
    data=flags.DEFINE_string(
      "data",
      None,
      "Table to train from: a CSV, TSV, JSON lines, Parquet or Arrow file, a folder of these, or a saved Hugging Face "
      "data set; or a folder in the raw format; or the URL of one in a bucket (docs/data.md).",
    ),
    test_data=flags.DEFINE_string("test_data", None, "Table of the test rows, with the same columns."),
    labels_table=flags.DEFINE_string(
      "labels_table", None, "Table of labels: uid, text, and optionally content and images."
    ),
    label_separator=flags.DEFINE_string(
      "label_separator",
      None,
      "What separates the labels in a cell, such as '|'; empty if each cell is one label; by default as cells have it.",
    ),
    test_fraction=flags.DEFINE_float(
      "test_fraction", None, "Share of the rows that are for testing, if the table does not say; by default 0.1."
    ),
    columns=dict(
      text=flags.DEFINE_string("text_column", None, _column("the texts")),
      labels=flags.DEFINE_string("label_column", None, _column("the names of the labels")),
      content=flags.DEFINE_string("content_column", None, _column("more text")),
      uid=flags.DEFINE_string("uid_column", None, _column("the uids")),
      relevance=flags.DEFINE_string("relevance_column", None, _column("a number for each label")),
      images=flags.DEFINE_string("image_column", None, _column("the images, as paths or bytes")),
      split=flags.DEFINE_string("split_column", None, _column("the words train and test")),
    ),
  )


def _check_same_table(raw_dir: str, workdir: Path) -> None:
  """Checks that a run was started with the table of a raw folder, before its config.json is written again."""
  from vixml_jax.run import configuration

  if not (workdir / CONFIG).is_file():
    return
  started = configuration.read(workdir / CONFIG).dataset.raw_dir
  hashes = [Path(path).parent.name.rpartition("-")[2] for path in (raw_dir, started)]
  if hashes[0] != hashes[1]:
    raise InputError(
      f"{workdir}: was started with {started or 'other data'}, and --data with these flags is {raw_dir}; use another "
      "--workdir"
    )


def _column(what: str) -> str:
  return f"Column of {what}; by default found by names and contents; empty for none."


def with_default_config(argv: Sequence[str]) -> list[str]:
  """Returns the arguments of a command with `--config` before them, if they have `--data` and no `--config`."""
  names = {argument.lstrip("-").partition("=")[0] for argument in argv[1:] if argument.startswith("-")}
  if "data" not in names or "config" in names:
    return list(argv)
  return [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
