"""Image feature vectors of a data set as one array, sharded over the devices or memory-mapped on the host."""

from collections.abc import Callable, Iterator
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, Sharding
import numpy as np

from vixml_jax import sharding
from vixml_jax.array_file import ArrayFile
from vixml_jax.datasets.prepared import check_contents
from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of
from vixml_jax.images.feature_set import FeatureSet
from vixml_jax.input.packing import PackedImages
from vixml_jax.manifest import cached_folder
from vixml_jax.ragged import Ragged, offsets_of
from vixml_jax.stages import stage

_FORMAT = 1
_SPLITS = ("train", "labels", "test")
# The share of a device's memory that features may take: parameters, optimizer and activations need the rest.
_MEMORY_SHARE = 0.25


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceImages:
  """Images of packed rows on the mesh, J places a row; leading chunk dimensions are possible.

  Attributes:
    segments: int32 [..., R, J], slot 1..S of the item that an image belongs to; 0 for an empty place.
    positions: int32 [..., R, J], the image's position among the tokens of its row; T where it has none.
    rows: int32 [..., R, J], rows of the features on the devices; None where `features` is set.
    features: float16 [..., R, J, F], gathered on the host; None where the features are on the devices.
  """

  segments: jax.Array
  positions: jax.Array
  rows: jax.Array | None = None
  features: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
  """Feature vectors of M images.

  Attributes:
    values: float16 [M, F] on the host, memory-mapped or not.
    on_devices: float16 [M rounded up, F], sharded over the mesh; None where the features stay on the host.
  """

  values: np.ndarray
  on_devices: jax.Array | None = None

  def placed(self, mesh: Mesh, where: str) -> "ImageFeatures":
    """Returns the features where `fusion.bank` asks for them.

    Args:
      mesh: the devices.
      where: "device", "host", or "auto" for the devices if they fit (see `fits_devices`).
    """
    memory = sharding.device_memory(mesh.local_devices)
    if where == "host" or (where == "auto" and not fits_devices(len(self.values), self.values.shape[1], mesh, memory)):
      return self
    rows = _ZeroPadded(self.values, sharding.padded_rows(len(self.values)))
    on_devices = jax.make_array_from_callback(rows.shape, sharding.named_sharding(mesh, "image", "vector"), rows.read)
    return dataclasses.replace(self, on_devices=on_devices)

  def on_mesh(
    self, images: PackedImages, mesh: Mesh, place: Callable[[np.ndarray, Sharding], Any] = sharding.to_global
  ) -> DeviceImages:
    """Returns packed images on the mesh, sharded by row: with row numbers, or with features gathered here.

    Args:
      images: The packed images.
      mesh: The devices.
      place: Function that places an array: `sharding.to_global` or `sharding.as_argument`.
    """
    leading = ("chunk",) * (images.rows.ndim - 2)
    by_row = sharding.named_sharding(mesh, *leading, "row", "vector")
    segments, positions = (place(array, by_row) for array in (images.segments, images.positions))
    if self.on_devices is not None:
      return DeviceImages(segments, positions, rows=place(images.rows, by_row))
    features = place(np.asarray(self.values[images.rows]), by_row)
    return DeviceImages(segments, positions, features=features)


@dataclasses.dataclass(frozen=True)
class DatasetFeatures:
  """The image features of a data set, and which of them each item has.

  Attributes:
    features: vectors of all images of all splits.
    rows: for "train", "labels" and "test" the rows of `features` of each item, by ascending slot.
    fingerprint: sha256 in hex of what the features were made of and of how many images an item may have.
  """

  features: ImageFeatures
  rows: dict[str, Ragged]
  fingerprint: str


def bytes_per_device(num_images: int, dim: int, mesh: Mesh) -> int:
  """Returns the memory that M float16 vectors of width F take on each device of a mesh."""
  return sharding.padded_rows(num_images) * dim * np.dtype(np.float16).itemsize // sharding.row_devices(mesh)


def fits_devices(num_images: int, dim: int, mesh: Mesh, memory: float) -> bool:
  """Returns whether `fusion.bank=auto` keeps the features on the devices: they take at most a quarter of the memory.

  Args:
    num_images: M.
    dim: F.
    mesh: the devices.
    memory: bytes of each device.
  """
  return bytes_per_device(num_images, dim, mesh) <= _MEMORY_SHARE * memory


def load_image_features(features: FeatureSet, images: int, cache_dir: str | os.PathLike[str]) -> DatasetFeatures:
  """Reads a set of features into one array, or opens what an earlier call left in `cache_dir`, if it is whole.

  Args:
    features: the set that `extract_features` wrote.
    images: I, the most images of an item; those of the lowest slots are kept.
    cache_dir: folder for the arrays of all sets.

  Returns:
    The features, memory-mapped.

  Raises:
    InputError: no item has an image, the set of features is damaged, or the disk is full.
  """
  fingerprint = fingerprint_of({"format": _FORMAT, "images": images} | features.metadata)
  # The metadata of extracted features replace `images` by where the images came from, so I is added here.
  key = fingerprint_of([fingerprint, images])
  folder = Path(cache_dir) / f"{features.metadata['dataset']}-{key[:16]}"

  def write(work: Path) -> None:
    check_contents(features.builder)
    _write(features, images, work)

  cached_folder(folder, write)
  try:
    values = np.load(folder / "values.npy", mmap_mode="r", allow_pickle=False)
    offsets = {split: np.load(folder / f"{split}.npy", allow_pickle=False) for split in _SPLITS}
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"{folder}: cannot be read ({error}); delete it to build it again") from error
  if not len(values):
    raise InputError(f"{features.metadata['dataset']}: none of its items has an image; set --config.images=0")
  return DatasetFeatures(
    ImageFeatures(values), {split: _row_ids(array) for split, array in offsets.items()}, fingerprint
  )


def _write(features: FeatureSet, images: int, folder: Path) -> None:
  """Writes one array of all vectors, split after split, and the offsets of the items."""
  with ArrayFile(folder / "values.npy", np.float16, (features.dim,)) as file:
    for split in _SPLITS:
      first, lengths = file.rows, [np.zeros(0, np.int64)]
      rows = features.metadata["rows"][split]
      with stage(f"load {split} features", total=rows, unit="row", logged=False) as progress:
        for kept, values in _first_images(features, split, images):
          file.append(values)
          lengths.append(kept)
          progress.advance(len(kept))
      np.save(folder / f"{split}.npy", first + offsets_of(np.concatenate(lengths)))


def _first_images(features: FeatureSet, split: str, images: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields lengths and vectors of blocks of items, at most the first `images` of each item."""
  for lengths, values in features.split(split):
    kept = Ragged.of_lengths(np.arange(len(values)), lengths).first(images)
    yield kept.lengths, values[kept.values]


def _row_ids(offsets: np.ndarray) -> Ragged:
  """Returns the rows of each item's features, which are stored item after item."""
  return Ragged(np.arange(offsets[0], offsets[-1], dtype=np.int32), offsets - offsets[0])


@dataclasses.dataclass(frozen=True)
class _ZeroPadded:
  """Rows with zeros below them, read a part at a time."""

  values: np.ndarray
  num_rows: int

  @property
  def shape(self) -> tuple[int, int]:
    return self.num_rows, self.values.shape[1]

  def read(self, index: Any) -> np.ndarray:
    rows = np.arange(self.num_rows)[index[0]]
    part = np.zeros((len(rows), self.values.shape[1]), self.values.dtype)
    known = self.values[rows[0] : min(rows[-1] + 1, len(self.values))]
    part[: len(known)] = known
    return part
