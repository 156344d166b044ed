"""Image features of a data set as a TFDS data set: one example a row, with a vector for each image.

Splits `train`, `test`, `labels`, whose rows are those of the data set that the images belong to. A folder
`<data_dir>/<data set>_features/<name>/1.0.0` holds features of one kind; it is opened only for the data that it was
made of.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import os
from pathlib import Path
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from vixml_jax.datasets import building
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError

ROWS_A_SHARD = 50_000
SPLITS = ("train", "test", "labels")
_VERSION = "1.0.0"
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*")

RowReader = Callable[[str, int, int], Iterator[tuple[np.ndarray, np.ndarray]]]
"""`(split, start, stop)` -> slots int32 [I] and features float16 [I, F] of each of these rows."""


class ImageFeatures(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """Features of the images of a data set, in the order of its rows."""

  VERSION = tfds.core.Version(_VERSION)
  name = "image_features"

  def __init__(self, dataset: str, config: str, metadata: dict[str, Any], rows: RowReader, data_dir: str | os.PathLike):
    self.name = f"{dataset}_features"
    self._metadata, self._rows = metadata, rows
    super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=config, description=config))

  def _info(self) -> tfds.core.DatasetInfo:
    tensor = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.BYTES)
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {
          "slots": tensor(shape=(None,), dtype=np.int32, doc="slot of each image that has features, ascending"),
          "features": tensor(shape=(None, self._metadata["dim"]), dtype=np.float16, doc="one vector an image"),
        }
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(self._metadata),
    )

  def _shard_iterators_per_split(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict]]]]]:
    del dl_manager
    return {
      split: [
        functools.partial(self._examples, split, start, min(start + ROWS_A_SHARD, count))
        for start in range(0, count, ROWS_A_SHARD)
      ]
      for split, count in self._metadata["rows"].items()
    }

  def _examples(self, split: str, start: int, stop: int) -> Iterator[tuple[int, dict]]:
    with tqdm(
      total=self._metadata["rows"][split],
      initial=start,
      desc=f"write {split} features",
      unit=" rows",
      disable=None,
      leave=False,
    ) as bar:
      for number, (slots, features) in enumerate(self._rows(split, start, stop), start):
        row = {"slots": slots, "features": features}
        yield number, row
        row.clear()  # The writer holds on to a shard's examples until it has counted them.
        bar.update()


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """Features of the images of a data set.

  Attributes:
    builder: the TFDS data set, `split`s `train`, `test` and `labels`.
    metadata: `dataset` and `dataset_sha256` that it belongs to; `checkpoint`, `checkpoint_sha256` (of its files),
      `variant`, `preprocessing`, `images` (where they came from) and `dtype`, how it was made; `dim`; and by split
      `rows`, `num_images` with features and `num_bad_images` without.
  """

  builder: tfds.core.DatasetBuilder
  metadata: dict[str, Any]

  @property
  def dim(self) -> int:
    """F."""
    return self.metadata["dim"]

  def split(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The features of a split, a few thousand rows at a time, in the order of its rows.

    Yields:
      `lengths`, int64 [R], the number of images of each of the next R rows; and `values`, float16 [M, F] with
      M = sum(lengths), row by row and by ascending slot. An item's first I images are the first I of its vectors.
    """
    for batch in Records(self.builder, name).batches():
      rows = [record.numbers("features", np.float16) for record in batch]
      lengths = np.array([len(row) // self.dim for row in rows], np.int64)
      yield lengths, np.concatenate(rows).reshape(-1, self.dim)


def features_folder(builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike, name: str) -> Path:
  """Where the features called `name` of a data set are or will be.

  Raises:
    InputError: the name is not fit for a folder.
  """
  if not _NAME.fullmatch(name):
    raise InputError(f"features called {name!r}: a name has letters, digits, '_', '-' and '.'; choose another --name")
  return Path(data_dir) / f"{builder.name}_features" / name / _VERSION


def open_features(builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike, name: str) -> FeatureSet:
  """Opens the features of a data set's images.

  Args:
    builder: the prepared data set.
    data_dir: folder for all prepared data.
    name: what the features are called: the variant or checkpoint that made them, unless they were named.

  Raises:
    InputError: there are none of that name, or they were made of other raw files.
  """
  folder = features_folder(builder, data_dir, name)
  if not (folder / "dataset_info.json").is_file():
    raise InputError(f"{folder}: no image features; make them with python -m vixml_jax.extract_features")
  features = tfds.builder_from_directory(folder)
  metadata = dict(features.info.metadata)
  found, wanted = metadata["dataset_sha256"], builder.info.metadata["sha256"]
  changed = sorted(file for file in found.keys() | wanted.keys() if found.get(file) != wanted.get(file))
  if changed:
    raise InputError(
      f"{folder}: features of the images of other raw files than {builder.name} now has "
      f"({', '.join(changed)} differ); choose another --name, or delete the folder and extract again"
    )
  return FeatureSet(features, metadata)


def find_features(
  builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike, name: str, made_by: dict[str, Any]
) -> FeatureSet | None:
  """The features that `made_by` would make, if they are there.

  Args:
    builder: the prepared data set.
    data_dir: folder for all prepared data.
    name: of the features.
    made_by: what decides the features; a part of their metadata.

  Raises:
    InputError: there are features of that name that were made otherwise.
  """
  folder = features_folder(builder, data_dir, name)
  if not folder.is_dir():
    return None
  features = open_features(builder, data_dir, name)
  other = [key for key, value in made_by.items() if features.metadata.get(key) != value]
  if other:
    raise InputError(
      f"{folder}: holds features with another {' and '.join(other)}; choose another --name, or delete "
      "the folder to make them again"
    )
  return features


def write_features(
  builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike, name: str, metadata: dict[str, Any], rows: RowReader
) -> FeatureSet:
  """Writes features as a TFDS data set, whole or not at all. One process at a time may be here.

  Args:
    builder: the prepared data set.
    data_dir: folder for all prepared data.
    name: of the features.
    metadata: `dim` and how the features were made; what they belong to is added.
    rows: reads them.

  Returns:
    The features, opened.
  """
  folder = features_folder(builder, data_dir, name)
  metadata = {
    "dataset": builder.name,
    "dataset_sha256": dict(builder.info.metadata["sha256"]),
    "rows": {split: builder.info.metadata["counts"][split] for split in SPLITS},
  } | metadata
  building.remove_leftovers(folder)
  building.build(ImageFeatures(builder.name, name, metadata, rows, data_dir), data_dir)
  return open_features(builder, data_dir, name)


def to_float16(values: np.ndarray) -> np.ndarray | None:
  """float16 of the same shape, or None where a value is not finite or beyond what float16 holds."""
  with np.errstate(over="ignore"):
    halves = values.astype(np.float16)
  return halves if np.isfinite(halves).all() else None
