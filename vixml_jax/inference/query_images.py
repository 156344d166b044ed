"""Feature vectors of queries' pictures, made by the tower that made those of the training data, and as it did."""

from collections.abc import Iterator, Sequence
import functools
import os
from pathlib import Path
import threading
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.images.sources import EncodedImage
from vixml_jax.images.tower import ImageTower
from vixml_jax.weights.siglip import checkpoint_hashes

_PUBLISHED = "published"  # Preprocessing of features that were downloaded: which tower made them is in no file's hash.


class QueryImageEncoder:
  """A SigLIP tower that is loaded when the first picture comes.

  Args:
    config: of the run.
    origin: how the features of the training data were made (`inference.json`).
    checkpoint: the tower, as `load_siglip` takes it; by default the one that the config or the features name.
    batch_size: pictures that go through the tower at a time; fewer cost as much.
  """

  def __init__(self, config: ConfigDict, origin: dict[str, Any], checkpoint: str | None, batch_size: int):
    self._config, self._origin = config, origin
    self._checkpoint, self._batch_size = checkpoint, batch_size
    self._lock = threading.Lock()

  def __call__(self, pictures: Sequence[bytes | Path]) -> tuple[np.ndarray, list[str | None]]:
    """Features of encoded images or of files that hold them.

    Returns:
      float16 [pictures, F], zeros for a picture that cannot be read, and why it cannot (None where it can).

    Raises:
      InputError: the tower is not here, or is another one.
    """
    with self._lock:  # The tower is loaded once, whoever comes first.
      tower = self._tower
    ((_, part),) = tower.encode_parts(_Given(pictures), [0], "query")
    return part.features, part.reasons

  @functools.cached_property
  def _tower(self) -> ImageTower:
    checkpoint = self._find()
    origin, wanted = self._origin, self._config.features
    published = origin.get("preprocessing") == _PUBLISHED
    if not published and sorted(checkpoint_hashes(checkpoint).values()) != sorted(origin["checkpoint_sha256"]):
      raise InputError(
        f"{checkpoint}: is not the tower that made the image features {wanted.name} (another sha256); "
        f"name {origin.get('checkpoint', 'that one')} by --image_checkpoint"
      )
    dtype = "float32" if jax.default_backend() == "cpu" else origin.get("dtype", "bfloat16")
    tower = ImageTower(
      checkpoint,
      origin.get("variant") or None,
      wanted.preprocessing if published else origin["preprocessing"],
      self._batch_size,
      dtype,
    )
    if tower.dim != wanted.dim:
      raise InputError(
        f"{checkpoint}: gives features of {tower.dim} numbers, but the model takes {wanted.dim}; name "
        "the tower that made its image features by --image_checkpoint"
      )
    return tower

  def _find(self) -> str:
    """The tower's place: as given, else the first of those on record that is here."""
    if self._checkpoint:
      return self._checkpoint
    recorded = [self._config.features.checkpoint, self._origin.get("checkpoint", "")]
    recorded = [place for place in recorded if place and not place.endswith(".npy")]
    for place in recorded:
      if os.path.exists(os.path.expanduser(place)):
        return place
    made = f"the image features {self._config.features.name} were made by {' or '.join(recorded) or 'a tower'}, "
    raise InputError(
      f"{made}which is not here: name its npz file or folder by --image_checkpoint, or give feature "
      "vectors in place of pictures"
    )


class _Given:
  """Pictures at hand as a source of one part, a row each."""

  num_parts, identity = 1, None

  def __init__(self, pictures: Sequence[bytes | Path]):
    self._pictures = pictures

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    for part in parts:
      yield part, [EncodedImage(row, 0, blob) for row, blob in enumerate(self._pictures)]
