"""Finished parts of an extraction on disk, which a killed and restarted run keeps, and their merge in row order.

A part counts as finished if its files have the sizes that were recorded when they were on the disk. Their sha256 are
compared when the parts are merged.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import make_folder, writing
from vixml_jax.images.decoding import REASONS
from vixml_jax.manifest import describe_file, find_damage, read_hashes, write_hashes

_OPEN_FILES = 128
_KINDS = ("features", "index")
_INDEX = np.dtype([("row", np.int64), ("slot", np.int32), ("code", np.uint8)])
# Code 0 is an image with features.
_CODES = {reason: code for code, reason in enumerate(REASONS, 1)}


@dataclasses.dataclass(frozen=True)
class FeaturePart:
  """Features of M images of one split, in any order.

  Attributes:
    rows: Row of each image, int64 [M].
    slots: Slot of each image, int32 [M].
    reasons: For each image None, or the reason (one of `decoding.REASONS`) why it has no features; M entries.
    features: Feature vectors, float16 [M, F]; zeros for an image with a reason.
  """

  rows: np.ndarray
  slots: np.ndarray
  reasons: list[str | None]
  features: np.ndarray


class FeatureParts:
  """A folder of parts. Each part is written as a whole or not at all, also across a power cut.

  Attributes:
    dim: F, the size of a feature vector.
  """

  def __init__(self, folder: Path, dim: int):
    """Opens the folder and creates it if it does not exist."""
    self.dim = dim
    self._folder = folder
    with writing(folder):
      make_folder(folder)

  def finished(self, split: str) -> list[int]:
    """Returns the ascending numbers of the parts of a split that have been written."""
    numbers = sorted(int(path.name.split("-")[1]) for path in self._folder.glob(f"{split}-*-done.json"))
    return [number for number in numbers if self._damage(split, number, contents=False) is None]

  def write(self, split: str, number: int, part: FeaturePart) -> None:
    """Writes a part; an earlier part with this number is replaced."""
    index = np.empty(len(part.rows), _INDEX)
    index["row"], index["slot"] = part.rows, part.slots
    index["code"] = [_CODES[reason] if reason else 0 for reason in part.reasons]
    record, paths = self._record(split, number), [self._path(split, number, kind) for kind in _KINDS]
    with writing(record):
      record.unlink(missing_ok=True)
      for path, array in zip(paths, (part.features, index), strict=True):
        with path.open("wb") as file:
          np.save(file, array, allow_pickle=False)
      write_hashes(record, {path.name: describe_file(path) for path in paths})

  def merge(self, split: str) -> "MergedParts":
    """Returns all parts of a split, sorted by row and slot.

    Raises:
      InputError: An image occurs twice, or a part is damaged.
    """
    numbers = self.finished(split)
    for number in numbers:
      damage = self._damage(split, number, contents=True)
      if damage:
        self._record(split, number).unlink(missing_ok=True)
        raise InputError(f"{damage}; start the same command again, which makes this part again")
    parts = [self._load(split, number, "index") for number in numbers]
    index = np.concatenate([np.empty(0, _INDEX), *parts])
    lengths = [len(part) for part in parts]
    part_numbers = np.repeat(np.array(numbers, np.int64), lengths)
    positions = np.concatenate([np.empty(0, np.int64), *map(np.arange, lengths)])
    where = np.stack([part_numbers, positions], 1)
    order = np.lexsort((index["slot"], index["row"]))
    index = index[order]
    keys = index[["row", "slot"]]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
      row, slot = keys[twice[0]]
      raise InputError(f"{split} images: row {row}, slot {slot} occurs twice; give each image of a row its own slot")
    return MergedParts(index, where[order], functools.partial(self._load, split, kind="features"), self.dim)

  def _path(self, split: str, number: int, kind: str) -> Path:
    return self._folder / f"{split}-{number:07d}-{kind}.npy"

  def _record(self, split: str, number: int) -> Path:
    """Returns the file with size and sha256 of the files of a finished part."""
    return self._folder / f"{split}-{number:07d}-done.json"

  def _damage(self, split: str, number: int, *, contents: bool) -> str | None:
    """Returns what is wrong with the files of a part; None if they are those that were recorded."""
    record = self._record(split, number)
    try:
      files = read_hashes(record)
    except InputError as error:
      return str(error)
    damage = find_damage(self._folder, files, contents=contents)
    return f"{self._folder / damage.name}: is damaged ({damage.reason})" if damage else None

  def _load(self, split: str, number: int, kind: str) -> np.ndarray:
    path = self._path(split, number, kind)
    try:
      return np.load(path, mmap_mode="r" if kind == "features" else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise InputError(f"{path}: cannot be read ({error}); delete its folder and start again") from error


class MergedParts:
  """The images of one split by row and slot. Features stay on disk until they are requested.

  Attributes:
    num_images: Number of images with features.
    num_bad_images: Number of images without features.
  """

  def __init__(self, index: np.ndarray, where: np.ndarray, load: Callable[[int], np.ndarray], dim: int):
    """Collects the images.

    Args:
      index: Row, slot and reason of each image, sorted by row and slot; structured array [M].
      where: Number of the part of each image and the image's position in that part, int64 [M, 2].
      load: Opens the features of a part by its number.
      dim: F.
    """
    good = index["code"] == 0
    self._images, self._where, self._bad = index[good], where[good], index[~good]
    self._load, self._dim = functools.lru_cache(_OPEN_FILES)(load), dim
    self.num_images, self.num_bad_images = len(self._images), len(self._bad)

  def bad_images(self) -> list[tuple[int, int, str]]:
    """Returns row, slot and reason of each image without features."""
    return [(row, slot, REASONS[code - 1]) for row, slot, code in self._bad.tolist()]

  def rows(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields slots, int32 [I], and features, float16 [I, F], of each row of a range; I is 0 without images."""
    bounds = np.searchsorted(self._images["row"], np.arange(start, stop + 1)).tolist()
    for first, last in itertools.pairwise(bounds):
      features = np.empty((last - first, self._dim), np.float16)
      for index, (number, position) in enumerate(self._where[first:last].tolist()):
        features[index] = self._load(number)[position]
      yield self._images["slot"][first:last], features
