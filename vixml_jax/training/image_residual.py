"""The residual map of images at the start: whitened features, turned into the embedding space by a random rotation."""

import jax
import numpy as np

from vixml_jax import sharding
from vixml_jax.images.features import ImageFeatures
from vixml_jax.typing import Tree

_SAMPLE = 65536  # Images that the covariance is taken of.
# Eigenvalues are raised to minus this: halfway between the features as they are (0) and white ones (1/2).
_POWER = 0.25


def start_residual(fusion: Tree, bank: ImageFeatures, norm: float, seed: int) -> Tree:
  """Parameters of the image fusion whose residual maps the bank's features to vectors of a given length.

  The map keeps angles between partly whitened features, so that from the first step on items that look alike have
  embeddings that are a little nearer; a random kernel would have to find that in what training says of labels.

  Args:
    fusion: parameters of `models.fusion.ImageFusion` with a residual.
    bank: features of the data set.
    norm: root mean square length of the vectors that are added to pooled outputs.
    seed: of the rotation.

  Returns:
    The parameters with another `residual`.
  """
  old = fusion["residual"]
  dim, embed_dim = old["kernel"].shape
  kernel, bias = whitened_map(np.asarray(bank.values[:: -(-len(bank.values) // _SAMPLE)], np.float64), embed_dim, seed)
  scale = norm * np.sqrt(dim)  # The model divides by it.
  new = {"kernel": kernel * scale, "bias": bias * scale}
  return fusion | {
    "residual": jax.tree.map(lambda value, like: sharding.to_global(value.astype(like.dtype), like.sharding), new, old)
  }


def whitened_map(features: np.ndarray, embed_dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """A kernel [F, D] and a bias [D] that center, partly whiten and rotate features.

  Args:
    features: [M, F].
    embed_dim: D; where it is less than F, the directions of greatest variance are kept.
    seed: of the rotation.

  Returns:
    The map; its outputs for `features` have a root mean square length of 1.
  """
  mean = features.mean(0)
  variances, directions = np.linalg.eigh((features - mean).T @ (features - mean) / len(features))
  kept = np.argsort(-variances)[: min(embed_dim, (variances > 1e-9 * variances.max()).sum())]
  white = directions[:, kept] * variances[kept] ** -_POWER
  rotation = np.linalg.qr(np.random.default_rng((seed, 4)).normal(size=(embed_dim, len(kept))))[0].T
  kernel = white @ rotation / np.sqrt((variances[kept] ** (1 - 2 * _POWER)).sum())
  return kernel, -mean @ kernel
