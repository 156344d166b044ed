"""Writes random image features of a prepared data set, so that tests of fusion need no tower."""

from collections.abc import Iterator
import os

import numpy as np
import tensorflow_datasets as tfds

from vixml_jax.images.feature_set import FeatureSet, write_features


def write_random_features(
  builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike[str], name: str, dim: int, most: int = 3, seed: int = 0
) -> FeatureSet:
  """Writes features of 0 to `most` images for every row of every split."""
  rng = np.random.default_rng(seed)
  counts = {split: rng.integers(0, most + 1, rows) for split, rows in builder.info.metadata["counts"].items()}
  vectors = {split: rng.normal(size=(count.sum(), dim)).astype(np.float16) for split, count in counts.items()}
  ends = {split: np.cumsum(count) for split, count in counts.items()}

  def rows(split: str, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for row in range(start, stop):
      count, end = counts[split][row], ends[split][row]
      yield np.arange(count, dtype=np.int32), vectors[split][end - count : end]

  return write_features(
    builder,
    data_dir,
    name,
    {"dim": dim, "variant": "random", "checkpoint_sha256": {}, "preprocessing": "big_vision", "images": "random"},
    rows,
  )
