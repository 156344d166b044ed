"""Writes random image features of a prepared set, so that fusion is tested without a tower."""

import numpy as np

from vixml_jax.images.feature_set import FeatureSet, write_features


def write_random_features(builder, data_dir, name: str, dim: int, most: int = 3, seed: int = 0) -> FeatureSet:
  """Features of 0 to `most` images for every row of every split; labels have one image more often than not."""
  rng = np.random.default_rng(seed)
  counts = {split: rng.integers(0, most + 1, rows) for split, rows in builder.info.metadata["counts"].items()}
  vectors = {split: rng.normal(size=(count.sum(), dim)).astype(np.float16) for split, count in counts.items()}
  ends = {split: np.cumsum(count) for split, count in counts.items()}

  def rows(split, start, stop):
    for row in range(start, stop):
      count, end = counts[split][row], ends[split][row]
      yield np.arange(count, dtype=np.int32), vectors[split][end - count : end]

  return write_features(
    builder,
    data_dir,
    name,
    {"dim": dim, "variant": "random", "checkpoint_sha256": {}, "preprocessing": "big_vision"},
    rows,
  )
