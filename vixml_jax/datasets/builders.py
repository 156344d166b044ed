"""TFDS builders of the known data sets; each reads a raw folder and keeps the order of its rows.

Splits `train`, `test`, `labels`. A label's row is its id, so records are written in the order of
the raw files: `ShardBasedBuilder` streams them, while `GeneratorBasedBuilder` keeps a split in
memory and, beyond 1 GB, needs TensorFlow to spill it.
"""

from collections.abc import Callable, Iterator
import itertools
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from vixml_jax.datasets import raw
from vixml_jax.errors import InputError

ROWS_A_SHARD = 50_000

_AMAZON_COUNTS = {"train": 294_805, "test": 134_835, "labels": 131_073}
EXPECTED_COUNTS = {
  "lf_amazon_titles_131k": _AMAZON_COUNTS,
  "lf_amazon_131k": _AMAZON_COUNTS,
  "mm_amazon_titles_300k": {"train": 586_781, "test": 260_536, "labels": 303_296},
  "lf_amazon_titles_1_3m": {"train": 2_248_619, "test": 970_237, "labels": 1_305_265},
  "mm_icons_9k": {"train": 17_083, "test": 5_646, "labels": 9_527},
}
"""Rows of each split of the published sets; what differs from them is refused."""


# TFDS publishes no types: to mypy its classes take no keyword.
class RawFolder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """Any folder in the raw format; the subclasses name a data set and the text that it uses."""

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the raw files (see vixml_jax.datasets.raw) into one folder."
  TEXT_FIELDS: tuple[str, ...] = ("title",)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {
          "uid": tfds.features.Text(),
          "title": tfds.features.Text(),
          "content": tfds.features.Text(),
          "target_ind": _numbers(np.int32, "label ids of a query; none for a label"),
          "target_rel": _numbers(np.float32, "relevance of each of them"),
          "filter_ind": _numbers(np.int32, "labels to take out before a query is scored"),
          "image_slots": _numbers(np.int32, "slot of each image"),
          "images": tfds.features.Tensor(shape=(None,), dtype=np.object_, doc="encoded, as given"),
        }
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _shard_iterators_per_split(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict]]]]]:
    folder = Path(dl_manager.manual_dir)
    raw.check_folder(folder)
    counts = {split: _count(folder / files.rows) for split, files in raw.SPLITS.items()}
    _check_counts(self.name, folder, counts)
    self.info.metadata.update(sha256=raw.sha256_of_files(folder), counts=counts, text_fields=list(self.TEXT_FIELDS))
    # Labels come first, since a mistake in them is behind most mistakes elsewhere.
    return {split: _shards(folder, split, counts) for split in ("labels", "train", "test")}


class LfAmazonTitles131k(RawFolder):
  """LF-AmazonTitles-131K: a product's title -> products bought with it."""

  name = "lf_amazon_titles_131k"


class LfAmazon131k(RawFolder):
  """LF-Amazon-131K: a product's title and description -> products bought with it."""

  name = "lf_amazon_131k"
  TEXT_FIELDS = ("title", "content")


class MmAmazonTitles300k(RawFolder):
  """MM-AmazonTitles-300K: a product's title and images -> products bought with it."""

  name = "mm_amazon_titles_300k"


class LfAmazonTitles13m(RawFolder):
  """LF-AmazonTitles-1.3M: a product's title -> products seen or bought with it."""

  name = "lf_amazon_titles_1_3m"


class MmIcons9k(RawFolder):
  """MM-Icons-9K: an icon's name and pictures -> the tags that its authors gave it."""

  name = "mm_icons_9k"


class Custom(RawFolder):
  """A folder of your own in the raw format."""

  name = "custom"


BUILDERS = {
  builder.name: builder
  for builder in (LfAmazonTitles131k, LfAmazon131k, MmAmazonTitles300k, LfAmazonTitles13m, MmIcons9k, Custom)
}


def _numbers(dtype: type, doc: str) -> tfds.features.Tensor:
  """A list of numbers as raw bytes, written several times faster than as a list of integers."""
  return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding=tfds.features.Encoding.BYTES, doc=doc)


def _count(path: Path) -> int:
  rows = raw.count_rows(path)
  if not rows:
    raise InputError(f"{path}: the file is empty; it must have one JSON object a line")
  return rows


def _check_counts(name: str, folder: Path, counts: dict[str, int]) -> None:
  for split, expected in EXPECTED_COUNTS.get(name, {}).items():
    if counts[split] != expected:
      raise InputError(
        f"{folder / raw.SPLITS[split].rows}: {counts[split]} rows, but {name} has "
        f"{expected}; download the set again, or use configs/custom.py for another"
      )


def _shards(folder: Path, split: str, counts: dict[str, int]) -> list[Callable[[], Iterator[tuple[int, dict]]]]:
  """One generator function a shard; they are called in order and share one pass over the files."""
  num_rows = counts[split]
  examples = _examples(folder, split, counts)
  full_shards = (num_rows - 1) // ROWS_A_SHARD
  # The last shard runs the generator to its end, where the checks of a whole file are made.
  return [lambda: itertools.islice(examples, ROWS_A_SHARD)] * full_shards + [lambda: examples]


def _examples(folder: Path, split: str, counts: dict[str, int]) -> Iterator[tuple[int, dict]]:
  """Row number and features of every row of a split."""
  files, data_warnings = raw.SPLITS[split], raw.DataWarnings()
  num_rows, num_labels = counts[split], counts["labels"]
  if files.filter:
    rows = raw.read_queries(folder / files.rows, num_labels, data_warnings)
    excluded = raw.read_filter(folder / files.filter, num_rows, num_labels)
  else:
    rows, excluded = raw.read_labels(folder / files.rows, data_warnings), None
  images = raw.read_images(folder / files.images, num_rows)
  with tqdm(total=num_rows, desc=f"prepare {split}", unit=" rows", disable=None) as bar:
    # `rows` ends last, since what it checks at its end must be checked.
    for number, ((slots, blobs), row) in enumerate(zip(images, rows, strict=True)):
      row.setdefault("target_ind", np.zeros(0, np.int32))
      row.setdefault("target_rel", np.zeros(0, np.float32))
      row["filter_ind"] = np.zeros(0, np.int32) if excluded is None else excluded[number]
      row["image_slots"], row["images"] = np.asarray(slots, np.int32), blobs
      yield number, row
      # The writer holds on to a shard's examples until it has counted them.
      row.clear()
      bar.update()
  data_warnings.report()
