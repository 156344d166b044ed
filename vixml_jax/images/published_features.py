"""Imports the image features published with the paper.

The folder has two files for each split. `{trn,tst,lbl}_embs_imgs_3_1152_siglip2.npy` has the vectors, float32
[images, 1152]. `{train,test,labels}_imgs_384_3_map.npy` has a list for each row of the split, with the positions of its
images among the vectors, -1 for a missing image. The second file is a pickle, which `pickled_lists` reads.
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
  builder: tfds.core.DatasetBuilder,
  data_dir: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  name: str = "published",
) -> FeatureSet:
  """Makes features of the published files if that has not been done, and opens them.

  The slots of a row are the positions in its list. Vectors are stored as float16.

  Args:
    builder: Prepared data set to which the files belong.
    data_dir: Folder for all prepared data.
    folder: Folder with the six files.
    name: Name of the features.

  Raises:
    InputError: A file is missing, damaged, unsafe or belongs to another data set, or other features with this name
      exist.
  """
  folder = Path(folder)
  for file in (file for files in _FILES.values() for file in files):
    if not (folder / file).is_file():
      raise InputError(
        f"{folder / file}: missing; set --published to the folder with {', '.join(_FILES['train'])} and those of the "
        "other splits"
      )
  hashes = [sha256_of_file(folder / file) for files in _FILES.values() for file in files]
  made_by = {"checkpoint_sha256": sorted(hashes), "preprocessing": "published", "images": "published"}
  target = feature_set.features_folder(builder, data_dir, name)
  with locked(f"{target.parent}.lock"):
    found = feature_set.find_features(builder, data_dir, name, made_by)
    return found or _write(builder, data_dir, folder, name, made_by)


def _write(
  builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike[str], folder: Path, name: str, made_by: dict[str, Any]
) -> FeatureSet:
  splits = {split: _PublishedSplit(folder, split, count) for split, count in builder.info.metadata["counts"].items()}
  dims = {split: published.dim for split, published in splits.items()}
  if len(set(dims.values())) > 1:
    raise InputError(f"{folder}: the features of the splits have different sizes: {dims}; use files of one data set")
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
  """The two files of one split, checked."""

  def __init__(self, folder: Path, split: str, num_rows: int):
    vectors, lists = (folder / file for file in _FILES[split])
    self._vectors_path, self._vectors = vectors, _open_vectors(vectors)
    self._map = read_lists(lists)
    self.dim = self._vectors.shape[1]
    self.num_images = int((self._map.values >= 0).sum())
    if len(self._map) != num_rows:
      raise InputError(
        f"{lists}: {len(self._map)} rows, but the {split} split has {num_rows}; check that the files belong to this "
        "data set"
      )
    _check_range(lists, self._map, len(self._vectors))

  def rows(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields slots, int32 [I], and features, float16 [I, F], of each row of a range."""
    for row in range(start, stop):
      images = self._map[row]
      slots = np.flatnonzero(images >= 0).astype(np.int32)
      values = feature_set.to_float16(self._vectors[images[slots]])
      if values is None:
        raise InputError(
          f"{self._vectors_path}: rows {images[slots].tolist()} have values that are not finite or exceed float16; "
          "download it again"
        )
      yield slots, values


def _open_vectors(path: Path) -> np.ndarray:
  try:
    vectors = np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"{path}: not a readable .npy file of numbers ({error}); download it again") from error
  if vectors.ndim != 2 or vectors.dtype.kind != "f":
    raise InputError(
      f"{path}: has shape {vectors.shape} and type {vectors.dtype}, but must have a row of floats per image; "
      "download it again"
    )
  return vectors


def _check_range(path: Path, rows: Ragged, num_images: int) -> None:
  wrong = np.flatnonzero((rows.values < -1) | (rows.values >= num_images))
  if len(wrong):
    row = np.searchsorted(rows.offsets, wrong[0], "right") - 1
    raise InputError(
      f"{path}: row {row} has image {rows.values[wrong[0]]}, but images are 0 to {num_images - 1}; check that the two "
      "files of the split belong together"
    )
