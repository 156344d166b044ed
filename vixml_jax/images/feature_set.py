"""Image features of a data set as a TFDS data set: an example per row, with a vector for each image of the row.

The splits `train`, `test` and `labels` have the rows of the data set to which the images belong. The folder
`<data_dir>/<data set>_features/<name>/1.0.0` has features of one kind. It is opened only for the raw files from which
it was made.
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

from vixml_jax.datasets.prepared import build, changed_files, open_folder
from vixml_jax.datasets.raw import SPLITS
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.stages import stage

ROWS_PER_SHARD = 50_000
_VERSION = "1.0.0"
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*")

RowReader = Callable[[str, int, int], Iterator[tuple[np.ndarray, np.ndarray]]]
"""`(split, start, stop)` -> slots, int32 [I], and features, float16 [I, F], of each row of the range."""


class FeatureSetBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """Features of the images of a data set, in the order of its rows."""

  VERSION = tfds.core.Version(_VERSION)
  name = "image_features"

  def __init__(
    self, dataset: str, config: str, metadata: dict[str, Any], rows: RowReader, data_dir: str | os.PathLike[str]
  ):
    """Makes a builder.

    Args:
      dataset: Name of the data set to which the images belong.
      config: Name of the features.
      metadata: Metadata of the feature set, with `dim` and `rows` (the number of rows by split).
      rows: Reads the features.
      data_dir: Folder for all prepared data.
    """
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
          "slots": tensor(shape=(None,), dtype=np.int32, doc="slot of each image with features, ascending"),
          "features": tensor(shape=(None, self._metadata["dim"]), dtype=np.float16, doc="a vector per image"),
        }
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(self._metadata),
    )

  def _shard_iterators_per_split(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict[str, np.ndarray]]]]]]:
    del dl_manager
    return {
      split: [
        functools.partial(self._examples, split, start, min(start + ROWS_PER_SHARD, count))
        for start in range(0, count, ROWS_PER_SHARD)
      ]
      for split, count in self._metadata["rows"].items()
    }

  def _examples(self, split: str, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    rows = self._metadata["rows"][split]
    with stage(f"write {split} features", total=rows, unit="row", done=start, logged=False) as progress:
      for number, (slots, features) in enumerate(self._rows(split, start, stop), start):
        row = {"slots": slots, "features": features}
        yield number, row
        # The writer keeps the examples of a shard until it has counted them; emptied ones take no memory.
        row.clear()
        progress.advance()


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """Features of the images of a data set.

  Attributes:
    builder: TFDS data set with the splits `train`, `test` and `labels`.
    metadata: `dataset` and `dataset_sha256`, the data set and its raw files; `checkpoint`, `checkpoint_sha256` (of
      its files), `variant`, `preprocessing`, `images` (where they came from) and `dtype`, how the features were made;
      `dim`; and by split `rows`, `num_images` with features and `num_bad_images` without.
  """

  builder: tfds.core.DatasetBuilder
  metadata: dict[str, Any]

  @property
  def dim(self) -> int:
    """F, the size of a feature vector."""
    return self.metadata["dim"]

  def split(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the features of a split, a few thousand rows at a time, in row order.

    Yields:
      The number of images of each of the next R rows, int64 [R]; and their vectors, float16 [M, F] with M the sum of
      these numbers, by row and ascending slot. The first I images of an item are the first I of its vectors.
    """
    for batch in Records(self.builder, name).batches():
      rows = [record.numbers("features", np.float16) for record in batch]
      lengths = np.array([len(row) // self.dim for row in rows], np.int64)
      yield lengths, np.concatenate(rows).reshape(-1, self.dim)


def features_folder(builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike[str], name: str) -> Path:
  """Returns the folder of the features with a name, which need not exist.

  Raises:
    InputError: The name cannot be the name of a folder.
  """
  if not _NAME.fullmatch(name):
    raise InputError(
      f"features with the name {name!r}: a name consists of letters, digits, '_', '-' and '.'; choose another --name"
    )
  return Path(data_dir) / f"{builder.name}_features" / name / _VERSION


def open_features(builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike[str], name: str) -> FeatureSet:
  """Opens the features of the images of a data set.

  Args:
    builder: Prepared data set.
    data_dir: Folder for all prepared data.
    name: Name of the features: the variant or the checkpoint that made them, unless another name was given.

  Raises:
    InputError: No features with this name exist, or they were made from other raw files.
  """
  folder = features_folder(builder, data_dir, name)
  if not folder.is_dir():
    raise InputError(f"{folder}: no image features; make them with python -m vixml_jax.extract_features")
  features = open_folder(folder)
  metadata = dict(features.info.metadata)
  changed = changed_files(metadata["dataset_sha256"], builder.info.metadata["sha256"])
  if changed:
    raise InputError(
      f"{folder}: features of the images of other raw files than {builder.name} now has ({', '.join(changed)} differ); "
      "choose another --name, or delete the folder and extract them again"
    )
  return FeatureSet(features, metadata)


def find_features(
  builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike[str], name: str, made_by: dict[str, Any]
) -> FeatureSet | None:
  """Returns the features that `made_by` describes, or None if they do not exist.

  Args:
    builder: Prepared data set.
    data_dir: Folder for all prepared data.
    name: Name of the features.
    made_by: The part of the metadata that decides the values of the features.

  Raises:
    InputError: Features with this name exist that were made in another way.
  """
  folder = features_folder(builder, data_dir, name)
  if not folder.is_dir():
    return None
  features = open_features(builder, data_dir, name)
  other = [key for key, value in made_by.items() if features.metadata.get(key) != value]
  if other:
    raise InputError(
      f"{folder}: has features with another {' and '.join(other)}; choose another --name, or delete the folder to make "
      "them again"
    )
  return features


def write_features(
  builder: tfds.core.DatasetBuilder,
  data_dir: str | os.PathLike[str],
  name: str,
  metadata: dict[str, Any],
  rows: RowReader,
) -> FeatureSet:
  """Writes features as a TFDS data set, as a whole or not at all. Only one process may do so at a time.

  Args:
    builder: Prepared data set.
    data_dir: Folder for all prepared data.
    name: Name of the features.
    metadata: `dim` and how the features were made. The data set to which they belong is added here.
    rows: Reads the features.

  Returns:
    The features, opened.
  """
  metadata = {
    "dataset": builder.name,
    "dataset_sha256": dict(builder.info.metadata["sha256"]),
    "rows": {split: builder.info.metadata["counts"][split] for split in SPLITS},
  } | metadata
  build(
    lambda work: FeatureSetBuilder(builder.name, name, metadata, rows, work), features_folder(builder, data_dir, name)
  )
  return open_features(builder, data_dir, name)


def to_float16(values: np.ndarray) -> np.ndarray | None:
  """Converts an array to float16; returns None if a value is not finite or exceeds the range of float16."""
  with np.errstate(over="ignore"):
    halves = values.astype(np.float16)
  return halves if np.isfinite(halves).all() else None
