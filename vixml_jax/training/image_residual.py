"""Initial residual map of images: whitened features, turned into the embedding space by a random rotation."""

import jax
import numpy as np

from vixml_jax import sharding
from vixml_jax.images.features import ImageFeatures
from vixml_jax.typing import Tree

_SAMPLE = 65536  # Images that the covariance is estimated on.
# Eigenvalues are raised to minus this: halfway between the features as they are (0) and white features (1/2).
_POWER = 0.25


def start_residual(fusion: Tree, features: ImageFeatures, norm: float, seed: int) -> Tree:
  """Returns parameters of the image fusion whose residual maps image features to vectors of a given length.

  The map keeps the angles between partly whitened features. From the first step on, items that look alike therefore
  have slightly nearer embeddings; a random kernel would have to learn that from the labels.

  Args:
    fusion: parameters of a `models.fusion.ImageFusion` with a residual.
    features: image features of the data set.
    norm: root mean square length of the vectors that are added to pooled outputs.
    seed: seed of the rotation.

  Returns:
    The parameters with another `residual`.
  """
  old = fusion["residual"]
  dim, embed_dim = old["kernel"].shape
  sample = np.asarray(features.values[:: -(-len(features.values) // _SAMPLE)], np.float64)
  kernel, bias = whitened_map(sample, embed_dim, seed)
  scale = norm * np.sqrt(dim)  # The model divides by it.
  new = {"kernel": kernel * scale, "bias": bias * scale}
  return fusion | {
    "residual": jax.tree.map(lambda value, like: sharding.to_global(value.astype(like.dtype), like.sharding), new, old)
  }


def whitened_map(features: np.ndarray, embed_dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns a kernel [F, D] and a bias [D] that center, partly whiten and rotate features.

  Args:
    features: [M, F].
    embed_dim: D; where it is less than F, the directions of greatest variance are kept.
    seed: seed of the rotation.

  Returns:
    The map. Its outputs for `features` have a root mean square length of 1.
  """
  mean = features.mean(0)
  variances, directions = np.linalg.eigh((features - mean).T @ (features - mean) / len(features))
  kept = np.argsort(-variances)[: min(embed_dim, (variances > 1e-9 * variances.max()).sum())]
  white = directions[:, kept] * variances[kept] ** -_POWER
  rotation = np.linalg.qr(np.random.default_rng((seed, 4)).normal(size=(embed_dim, len(kept))))[0].T
  kernel = white @ rotation / np.sqrt((variances[kept] ** (1 - 2 * _POWER)).sum())
  return kernel, -mean @ kernel
