"""Finished parts of an extraction, which a killed and restarted run keeps; merged in the order of rows at the end."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.images.decoding import REASONS

_OPEN_FILES = 128
_INDEX = np.dtype([("row", np.int64), ("slot", np.int32), ("code", np.uint8)])
# 0 is an image with features.
_CODES = {reason: code for code, reason in enumerate(REASONS, 1)}


@dataclasses.dataclass(frozen=True)
class FeaturePart:
  """Features of some images of one split, in any order.

  Attributes:
    rows: int64 [M], the row of each image.
    slots: int32 [M], its slot.
    reasons: why an image has no features (of `images.REASONS`), or None; M entries.
    features: float16 [M, F], zeros where there is a reason.
  """

  rows: np.ndarray
  slots: np.ndarray
  reasons: list[str | None]
  features: np.ndarray


class FeatureParts:
  """The parts in a folder; each is there whole or not at all.

  Args:
    folder: made when missing.
    dim: F.
  """

  def __init__(self, folder: Path, dim: int):
    self.dim = dim
    self._folder = folder
    folder.mkdir(parents=True, exist_ok=True)

  def finished(self, split: str) -> list[int]:
    """Numbers of the parts of a split that are there, ascending."""
    return sorted(int(path.name.split("-")[1]) for path in self._folder.glob(f"{split}-*-index.npy"))

  def write(self, split: str, number: int, part: FeaturePart) -> None:
    """Keeps a part; an earlier one of that number is replaced."""
    index = np.empty(len(part.rows), _INDEX)
    index["row"], index["slot"] = part.rows, part.slots
    index["code"] = [_CODES[reason] if reason else 0 for reason in part.reasons]
    self._save(split, number, "features", part.features)
    self._save(split, number, "index", index)  # Last: it says that the part is finished.

  def merge(self, split: str) -> "MergedParts":
    """All parts of a split, by row and slot.

    Raises:
      InputError: an image is there twice, or a part cannot be read.
    """
    numbers = self.finished(split)
    parts = [self._load(split, number, "index") for number in numbers]
    index = np.concatenate([np.empty(0, _INDEX), *parts])
    lengths = [len(part) for part in parts]
    where = np.stack(
      [
        np.repeat(np.array(numbers, np.int64), lengths),
        np.concatenate([np.empty(0, np.int64), *map(np.arange, lengths)]),
      ],
      1,
    )
    order = np.lexsort((index["slot"], index["row"]))
    index = index[order]
    keys = index[["row", "slot"]]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
      raise InputError(
        f"{split} images: row {keys[twice[0]][0]}, slot {keys[twice[0]][1]} is there twice; give each "
        "image of a row a slot of its own"
      )
    return MergedParts(index, where[order], functools.partial(self._load, split, what="features"), self.dim)

  def _path(self, split: str, number: int, what: str) -> Path:
    return self._folder / f"{split}-{number:07d}-{what}.npy"

  def _save(self, split: str, number: int, what: str, array: np.ndarray) -> None:
    path = self._path(split, number, what)
    work = path.with_suffix(".incomplete")
    with work.open("wb") as file:
      np.save(file, array, allow_pickle=False)
    work.rename(path)

  def _load(self, split: str, number: int, what: str) -> np.ndarray:
    path = self._path(split, number, what)
    try:
      return np.load(path, mmap_mode="r" if what == "features" else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise InputError(f"{path}: cannot be read ({error}); delete the folder and start again") from error


class MergedParts:
  """The images of one split by row and slot; features stay on disk until they are asked for.

  Args:
    index: array of `_INDEX` by row and slot.
    where: int64 [M, 2], the part of each image and its place in it.
    load: opens the features of a part.
    dim: F.

  Attributes:
    num_images: images with features.
    num_bad_images: images without.
  """

  def __init__(self, index: np.ndarray, where: np.ndarray, load: Callable[[int], np.ndarray], dim: int):
    good = index["code"] == 0
    self._images, self._where, self._bad = index[good], where[good], index[~good]
    self._load, self._dim = functools.lru_cache(_OPEN_FILES)(load), dim
    self.num_images, self.num_bad_images = len(self._images), len(self._bad)

  def bad_images(self) -> list[tuple[int, int, str]]:
    """Row, slot and reason of each image without features."""
    return [(row, slot, REASONS[code - 1]) for row, slot, code in self._bad.tolist()]

  def rows(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slots int32 [I] and features float16 [I, F] of each row of a range; I = 0 for a row without images."""
    bounds = np.searchsorted(self._images["row"], np.arange(start, stop + 1)).tolist()
    for first, last in itertools.pairwise(bounds):
      features = np.empty((last - first, self._dim), np.float16)
      for index, (number, position) in enumerate(self._where[first:last].tolist()):
        features[index] = self._load(number)[position]
      yield self._images["slot"][first:last], features
