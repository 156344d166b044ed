"""TFDS builders of the known data sets. Each reads a raw folder and keeps the order of its rows.

The splits are `train`, `test` and `labels`. The row of a label is its id, so rows are written in the order of the raw
files. `ShardBasedBuilder` streams them; `GeneratorBasedBuilder` would keep a split in memory and, beyond 1 GB, need
TensorFlow to write it to disk.
"""

from collections.abc import Callable, Iterator
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vixml_jax.datasets import raw, raw_images, raw_records, raw_rows
from vixml_jax.datasets.filters import load_filters
from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.stages import stage

ROWS_PER_SHARD = 50_000

_AMAZON_COUNTS = {"train": 294_805, "test": 134_835, "labels": 131_073}
EXPECTED_COUNTS = {
  "lf_amazon_titles_131k": _AMAZON_COUNTS,
  "lf_amazon_131k": _AMAZON_COUNTS,
  "mm_amazon_titles_300k": {"train": 586_781, "test": 260_536, "labels": 303_296},
  "lf_amazon_titles_1_3m": {"train": 2_248_619, "test": 970_237, "labels": 1_305_265},
  "mm_icons_9k": {"train": 17_083, "test": 5_646, "labels": 9_527},
}
"""Number of rows of each split of the published data sets. Raw files with other numbers are refused."""


_Examples = Iterator[tuple[int, dict[str, Any]]]
_Shard = Callable[[], _Examples]


# TFDS has no type annotations, so mypy does not know the keywords of its classes.
class RawFolder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """Builder of a folder in the raw format. Subclasses give the name of a data set and its text fields.

  Attributes:
    raw_dir: Folder or archive with the raw files; None for the `manual_dir` of TFDS, which must be a folder.
    allow_empty_filter: Accept a filter file without pairs although queries are labels.
  """

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "Copy the raw files or archives (see vixml_jax.datasets.raw) to one folder."
  TEXT_FIELDS: tuple[str, ...] = ("title",)
  raw_dir: Path | None = None
  allow_empty_filter: bool = False

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {
          "uid": tfds.features.Text(),
          "title": tfds.features.Text(),
          "content": tfds.features.Text(),
          "target_ind": _numbers(np.int32, "ids of the labels of a query; empty for a label"),
          "target_rel": _numbers(np.float32, "relevance of each of these labels"),
          "filter_ind": _numbers(np.int32, "ids of the labels that are removed before a query is scored"),
          "image_slots": _numbers(np.int32, "slot of each image"),
          "images": tfds.features.Tensor(shape=(None,), dtype=np.object_, doc="encoded images, as in the raw files"),
        }
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[_Shard]]:
    files = raw.find_files(self.raw_dir or Path(dl_manager.manual_dir))
    counts = {split: raw_rows.count_rows(found) for split, found in files.items()}
    _check_counts(self.name, files, counts)
    filters = load_filters(files, counts, self.allow_empty_filter)
    self.info.metadata.update(
      sha256=raw.sha256_of_files(files), counts=counts, text_fields=list(self.TEXT_FIELDS), filters=filters.metadata
    )
    excluded = {"train": filters.train, "test": filters.test, "labels": None}
    # Labels come first, since a mistake in them causes most mistakes elsewhere.
    return {
      split: _shards(_examples(files[split], split, counts, excluded[split]), counts[split])
      for split in ("labels", "train", "test")
    }


class LfAmazonTitles131k(RawFolder):
  """LF-AmazonTitles-131K: from the title of a product to the products bought with it."""

  name = "lf_amazon_titles_131k"


class LfAmazon131k(RawFolder):
  """LF-Amazon-131K: from the title and description of a product to the products bought with it."""

  name = "lf_amazon_131k"
  TEXT_FIELDS = ("title", "content")


class MmAmazonTitles300k(RawFolder):
  """MM-AmazonTitles-300K: from the title and images of a product to the products bought with it."""

  name = "mm_amazon_titles_300k"


class LfAmazonTitles13m(RawFolder):
  """LF-AmazonTitles-1.3M: from the title of a product to the products viewed or bought with it."""

  name = "lf_amazon_titles_1_3m"


class MmIcons9k(RawFolder):
  """MM-Icons-9K: from the name and images of an icon to the tags that its authors gave it."""

  name = "mm_icons_9k"


class Custom(RawFolder):
  """Any folder in the raw format."""

  name = "custom"


BUILDERS = {
  builder.name: builder
  for builder in (LfAmazonTitles131k, LfAmazon131k, MmAmazonTitles300k, LfAmazonTitles13m, MmIcons9k, Custom)
}


def _numbers(dtype: type, doc: str) -> tfds.features.Tensor:
  """Returns a feature that stores a list of numbers as raw bytes, which is several times faster than as a list."""
  return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding=tfds.features.Encoding.BYTES, doc=doc)


def _check_counts(name: str, files: dict[str, raw.FoundFiles], counts: dict[str, int]) -> None:
  for split, expected in EXPECTED_COUNTS.get(name, {}).items():
    if counts[split] != expected:
      raise InputError(
        f"{files[split].rows}: {counts[split]} rows, but {name} has {expected}; download the data set again, or use "
        "configs/custom.py for another one"
      )


def _shards(examples: _Examples, num_rows: int) -> list[_Shard]:
  """Returns a generator function for each shard. They are called in order and share one pass over the files."""
  full_shards = (num_rows - 1) // ROWS_PER_SHARD
  # The last shard exhausts the generator, whose end checks the file as a whole.
  return [lambda: itertools.islice(examples, ROWS_PER_SHARD)] * full_shards + [lambda: examples]


def _examples(files: raw.FoundFiles, split: str, counts: dict[str, int], excluded: Ragged | None) -> _Examples:
  """Yields row number and features of every row of a split."""
  data_warnings, num_rows = raw_records.DataWarnings(), counts[split]
  rows = raw_rows.read_rows(files, split, counts, data_warnings)
  images = raw_images.read_images(files.images, num_rows)
  with stage(f"prepare {split}", total=num_rows, unit="row", logged=False) as progress:
    # `rows` is exhausted last, so that its check of the whole file runs.
    for number, ((slots, blobs), row) in enumerate(zip(images, rows, strict=True)):
      row.setdefault("target_ind", np.zeros(0, np.int32))
      row.setdefault("target_rel", np.zeros(0, np.float32))
      row["filter_ind"] = np.zeros(0, np.int32) if excluded is None else excluded[number]
      row["image_slots"], row["images"] = np.asarray(slots, np.int32), blobs
      yield number, row
      # The writer keeps the examples of a shard until it has counted them; emptied ones take no memory.
      row.clear()
      progress.advance()
  data_warnings.report()
