"""Imports the image features published with the paper.

A folder holds, for each split, `{trn,tst,lbl}_embs_imgs_3_1152_siglip2.npy` (float32 [images, 1152], one row an image)
and `{train,test,labels}_imgs_384_3_map.npy` (for each row of the split a list of rows of the former, -1 for none; a
pickle, which is read by `pickled_lists`).
"""

from collections.abc import Iterator
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vixml_jax.errors import InputError
from vixml_jax.files import locked, sha256_of_file
from vixml_jax.images import feature_set
from vixml_jax.images.feature_set import FeatureSet
from vixml_jax.images.pickled_lists import read_lists
from vixml_jax.ragged import Ragged

_FILES = {
  "train": ("trn_embs_imgs_3_1152_siglip2.npy", "train_imgs_384_3_map.npy"),
  "test": ("tst_embs_imgs_3_1152_siglip2.npy", "test_imgs_384_3_map.npy"),
  "labels": ("lbl_embs_imgs_3_1152_siglip2.npy", "labels_imgs_384_3_map.npy"),
}


def import_published(
  builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike, folder: str | os.PathLike, name: str = "published"
) -> FeatureSet:
  """Makes features of the published files unless that has been done, and opens them.

  A row's slots are the places in its list. Vectors are kept as float16.

  Args:
    builder: the prepared data set that the files belong to.
    data_dir: folder for all prepared data.
    folder: with the six files.
    name: what to call the features.

  Raises:
    InputError: a file is missing, damaged, of another data set or not to be trusted, or there are other features of
      that name.
  """
  folder = Path(folder)
  for file in (file for files in _FILES.values() for file in files):
    if not (folder / file).is_file():
      raise InputError(
        f"{folder / file}: missing; --published names the folder with {', '.join(_FILES['train'])} and "
        "those of the other splits"
      )
  made_by = {"checkpoint_sha256": sorted(_sha256(folder)), "preprocessing": "published", "images": "published"}
  target = feature_set.features_folder(builder, data_dir, name)
  with locked(f"{target.parent}.lock"):
    found = feature_set.find_features(builder, data_dir, name, made_by)
    return found or _write(builder, data_dir, folder, name, made_by)


def _write(
  builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike, folder: Path, name: str, made_by: dict[str, Any]
) -> FeatureSet:
  splits = {split: _PublishedSplit(folder, split, count) for split, count in builder.info.metadata["counts"].items()}
  dims = {split: published.dim for split, published in splits.items()}
  if len(set(dims.values())) > 1:
    raise InputError(f"{folder}: the features of the splits have different sizes: {dims}; they are not of one set")
  metadata = made_by | {
    "checkpoint": _FILES["train"][0],
    "variant": "siglip2_so400m14_384",
    "dtype": "float32",
    "dim": dims["train"],
    "num_images": {split: published.num_images for split, published in splits.items()},
    "num_bad_images": dict.fromkeys(splits, 0),
  }
  return feature_set.write_features(
    builder, data_dir, name, metadata, lambda split, start, stop: splits[split].rows(start, stop)
  )


class _PublishedSplit:
  """The two files of one split."""

  def __init__(self, folder: Path, split: str, num_rows: int):
    vectors, lists = (folder / file for file in _FILES[split])
    self._vectors_path, self._vectors = vectors, _open_vectors(vectors)
    self._map = read_lists(lists)
    self.dim = self._vectors.shape[1]
    self.num_images = int((self._map.values >= 0).sum())
    if len(self._map) != num_rows:
      raise InputError(
        f"{lists}: {len(self._map)} rows, but the {split} split has {num_rows}; do these files belong to this data set?"
      )
    _check_range(lists, self._map, len(self._vectors))

  def rows(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slots and float16 features of each row of a range."""
    for row in range(start, stop):
      images = self._map[row]
      slots = np.flatnonzero(images >= 0).astype(np.int32)
      values = feature_set.to_float16(self._vectors[images[slots]])
      if values is None:
        raise InputError(
          f"{self._vectors_path}: among rows {images[slots].tolist()} are values that float16 cannot "
          "hold; download it again"
        )
      yield slots, values


def _open_vectors(path: Path) -> np.ndarray:
  try:
    vectors = np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"{path}: not a readable .npy file of numbers ({error}); download it again") from error
  if vectors.ndim != 2 or vectors.dtype.kind != "f":
    raise InputError(f"{path}: has shape {vectors.shape} and type {vectors.dtype}; a row of floats an image is wanted")
  return vectors


def _check_range(path: Path, rows: Ragged, num_images: int) -> None:
  wrong = np.flatnonzero((rows.values < -1) | (rows.values >= num_images))
  if len(wrong):
    row = np.searchsorted(rows.offsets, wrong[0], "right") - 1
    raise InputError(
      f"{path}: row {row} names image {rows.values[wrong[0]]}, but there are images 0 to "
      f"{num_images - 1}; do the two files of the split belong together?"
    )


def _sha256(folder: Path) -> list[str]:
  """Hex digest of each file."""
  return [sha256_of_file(folder / file) for files in _FILES.values() for file in files]
