"""Feature vectors of images in queries, made by the image tower that made the features of the training data."""

from collections.abc import Sequence
import functools
from pathlib import Path
import threading
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.images.processor import choose_preprocessing
from vixml_jax.images.tower import ImageTower, PreparedImage
from vixml_jax.inference.queries import Query
from vixml_jax.weights.vision import checkpoint_hashes, find_checkpoint

_PUBLISHED = "published"  # Preprocessing of downloaded features; no file records the hash of the tower that made them.


class UnreadableImage(NamedTuple):
  """An image without pixels.

  Attributes:
    query: Position of the query in the call, from 0.
    image: Position of the image in the query, from 0.
    reason: Why the image has no pixels.
  """

  query: int
  image: int
  reason: str


class QueryImageEncoder:
  """An image tower that is loaded when the first image is encoded."""

  def __init__(self, config: ConfigDict, origin: dict[str, Any], checkpoint: str | None, batch_size: int):
    """Records where the tower is.

    Args:
      config: Config of the run.
      origin: `image_features` of `inference.json`: how the features of the training data were made.
      checkpoint: The tower, see `load_tower`; None for the one that the config or `origin` names.
      batch_size: Number of images that the tower encodes at a time. A smaller batch takes as long as a full one.
    """
    self._config, self._origin = config, origin
    self._checkpoint, self._batch_size = checkpoint, batch_size
    self._lock = threading.Lock()

  def __call__(self, images: Sequence[bytes | Path | PreparedImage]) -> tuple[np.ndarray, list[str | None]]:
    """Encodes images.

    Args:
      images: Encoded images, files with encoded images, or images that `prepare` made.

    Returns:
      Features float16 [images, F], zeros for an image without pixels; and for each image the reason why it has no
      pixels, or None.

    Raises:
      InputError: The tower cannot be found, or it is not the one of the training data.
    """
    return self._tower().encode(images)

  def prepare(self, blob: bytes) -> PreparedImage:
    """Decodes and resizes an image for the tower. Several threads may call it at once.

    Raises:
      BadImage: The image has no pixels.
      InputError: As for `__call__`.
    """
    return self._tower().prepare(blob)

  def _tower(self) -> ImageTower:
    with self._lock:  # Only one thread loads it.
      return self._loaded_tower

  @functools.cached_property
  def _loaded_tower(self) -> ImageTower:
    found = find_tower(self._config, self._origin, self._checkpoint)
    dtype = "float32" if jax.default_backend() == "cpu" else self._origin.get("dtype", "bfloat16")
    tower = ImageTower(found.checkpoint, found.variant, found.preprocessing, self._batch_size, dtype)
    check_feature_size(found.checkpoint, tower.dim, self._config)
    return tower


class FoundTower(NamedTuple):
  """The tower that made the image features of a run.

  Attributes:
    checkpoint: File, folder or name on the hub; see `load_tower`.
    variant: Name of the published tower that it must be, or None.
    preprocessing: One of `images.preprocess.KINDS`, except "auto".
  """

  checkpoint: str
  variant: str | None
  preprocessing: str


def find_tower(config: ConfigDict, origin: dict[str, Any], checkpoint: str | None) -> FoundTower:
  """Returns the tower of a run, whose hashes are compared with the recorded ones.

  Args:
    config: As for `QueryImageEncoder`.
    origin: As for `QueryImageEncoder`.
    checkpoint: As for `QueryImageEncoder`.

  Raises:
    InputError: The tower cannot be found, or it is not the one of the training data.
  """
  features = config.features
  published = origin.get("preprocessing") == _PUBLISHED
  found = checkpoint or _recorded_tower(config, origin)
  path = find_checkpoint(found)
  if not published and sorted(checkpoint_hashes(path).values()) != sorted(origin["checkpoint_sha256"]):
    raise InputError(
      f"{found}: is not the tower that made the image features {features.name} (its sha256 differs); "
      f"set --image_checkpoint to {origin.get('checkpoint', 'that tower')}"
    )
  preprocessing = choose_preprocessing(features.preprocessing if published else origin["preprocessing"], path)
  return FoundTower(found, origin.get("variant") or None, preprocessing)


def check_feature_size(checkpoint: str, size: int, config: ConfigDict) -> None:
  """Checks that the features of a tower have the size that the model takes.

  Raises:
    InputError: They do not.
  """
  if size != config.features.dim:
    raise InputError(
      f"{checkpoint}: makes features of size {size}, but the model takes size {config.features.dim}; set "
      "--image_checkpoint to the tower that made the model's image features"
    )


def _recorded_tower(config: ConfigDict, origin: dict[str, Any]) -> str:
  """Returns the first recorded tower that exists."""
  recorded = [config.features.checkpoint, origin.get("checkpoint", "")]
  recorded = [place for place in recorded if place and not place.endswith(".npy")]
  for place in recorded:
    if Path(place).exists():
      return place
  raise InputError(
    f"the image features {config.features.name} were made by {' or '.join(recorded) or 'a tower'}, which does "
    "not exist here; set --image_checkpoint to its npz file or folder, or give feature vectors instead of images"
  )


def image_vectors(
  encoder: QueryImageEncoder, queries: Sequence[Query], unreadable: list[UnreadableImage] | None
) -> list[list[np.ndarray]]:
  """Returns the feature vectors of each query's images; the images of all queries are encoded together.

  Args:
    encoder: Encoder of the images.
    queries: Checked queries.
    unreadable: List that images without pixels are appended to; their queries get no vector for them. None to raise an
      error for such an image.

  Raises:
    InputError: An image has no pixels and `unreadable` is None.
  """
  images = {
    (i, j): image
    for i, query in enumerate(queries)
    for j, image in enumerate(query.images)
    if not isinstance(image, np.ndarray)
  }
  vectors: dict[tuple[int, int], np.ndarray] = {}
  if images:
    values, reasons = encoder(list(images.values()))
    for (i, j), value, reason in zip(images, values, reasons, strict=True):
      if reason is None:
        vectors[i, j] = value
      elif unreadable is None:
        raise InputError(f"{queries[i].where}: image {j}: {reason}; correct it or leave it out")
      else:
        unreadable.append(UnreadableImage(i, j, reason))
  return [
    [
      image if isinstance(image, np.ndarray) else vectors[i, j]
      for j, image in enumerate(query.images)
      if isinstance(image, np.ndarray) or (i, j) in vectors
    ]
    for i, query in enumerate(queries)
  ]
