"""The feature bank: the image vectors of a whole data set as one array, on the devices or memory-mapped."""

from collections.abc import Iterator
import dataclasses
import os
from pathlib import Path

import jax
from jax.sharding import Mesh
import numpy as np
from tqdm import tqdm

from vixml_jax import sharding
from vixml_jax.array_file import ArrayFile
from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of, locked, new_folder
from vixml_jax.images.feature_set import FeatureSet
from vixml_jax.input.packing import PackedImages
from vixml_jax.ragged import Ragged, offsets_of

_FORMAT = 1
_SPLITS = ("train", "labels", "test")
# Of a device's memory, what `auto` gives to the bank: parameters, optimizer and activations need the rest.
_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
  """M image vectors, and which of them each item has.

  Attributes:
    values: float16 [M, F], memory-mapped.
    images: for "train", "labels" and "test" the rows of `values` of each item, by ascending slot.
    fingerprint: sha256 in hex of what the features were made of and how many an item may have.
    on_devices: float16 [M rounded up, F], sharded over the mesh; None where the bank stays on the host.
  """

  values: np.ndarray
  images: dict[str, Ragged]
  fingerprint: str
  on_devices: jax.Array | None = None

  def placed(self, mesh: Mesh, where: str) -> "ImageFeatures":
    """The bank on the devices ("device"), left memory-mapped ("host"), or on the devices if it fits ("auto")."""
    if where == "auto":
      needed = bytes_per_device(len(self.values), self.values.shape[1], sharding.row_devices(mesh))
      where = "device" if needed <= _SHARE * _memory(mesh) else "host"
    if where == "host":
      return self
    rows = _ZeroPadded(self.values, sharding.padded_rows(len(self.values)))
    return dataclasses.replace(
      self,
      on_devices=jax.make_array_from_callback(rows.shape, sharding.named_sharding(mesh, "image", "vector"), rows.read),
    )

  def on_mesh(self, images: PackedImages, mesh: Mesh) -> dict[str, jax.Array]:
    """What a program needs of packed images, spread over the mesh by row.

    Returns:
      `segments` and `positions` as in `PackedImages`, and `rows` of the bank on the devices, or, where the bank is
      on the host, `features` float16 [chunks, R, J, F] gathered from it.
    """
    leading = ("chunk",) * (images.rows.ndim - 2)
    by_row = sharding.named_sharding(mesh, *leading, "row", "vector")
    arrays = {"segments": images.segments, "positions": images.positions}
    if self.on_devices is not None:
      arrays["rows"] = images.rows
    else:
      arrays["features"] = np.asarray(self.values[images.rows])
    return {name: sharding.to_global(array, by_row) for name, array in arrays.items()}


def bytes_per_device(num_images: int, dim: int, devices: int) -> int:
  """Memory that M vectors of width F in float16 take on each of the devices that share them."""
  return sharding.padded_rows(num_images) * dim * np.dtype(np.float16).itemsize // devices


def load_image_features(features: FeatureSet, images: int, cache_dir: str | os.PathLike) -> ImageFeatures:
  """Reads a data set of features into one array, or opens what an earlier call left in `cache_dir`.

  Args:
    features: what `extract_features` wrote.
    images: I, the most images of an item; those of the lowest slots are kept.
    cache_dir: folder for the arrays of all banks.

  Returns:
    The bank, memory-mapped.

  Raises:
    InputError: not one item has an image, or the cache cannot be read.
  """
  fingerprint = fingerprint_of({"format": _FORMAT, "images": images} | features.metadata)
  folder = Path(cache_dir) / f"{features.metadata['dataset']}-{fingerprint[:16]}"
  with locked(f"{folder}.lock"):
    if not folder.is_dir():
      with new_folder(folder) as work:
        _write(features, images, work)
  try:
    values = np.load(folder / "values.npy", mmap_mode="r", allow_pickle=False)
    offsets = {split: np.load(folder / f"{split}.npy", allow_pickle=False) for split in _SPLITS}
  except (OSError, ValueError) as error:
    raise InputError(f"{folder}: cannot be read ({error}); delete it to build it again") from error
  if not len(values):
    raise InputError(f"{features.metadata['dataset']}: none of its items has an image; set --config.images=0")
  return ImageFeatures(values, {split: _ids(array) for split, array in offsets.items()}, fingerprint)


def _write(features: FeatureSet, images: int, folder: Path) -> None:
  """One array of all vectors, split after split, and where each item's begin."""
  with ArrayFile(folder / "values.npy", np.float16, (features.dim,)) as file:
    for split in _SPLITS:
      first, lengths = file.rows, [np.zeros(0, np.int64)]
      with tqdm(
        total=features.metadata["rows"][split], desc=f"load {split} features", unit=" rows", disable=None, leave=False
      ) as bar:
        for kept, values in _first_images(features, split, images):
          file.append(values)
          lengths.append(kept)
          bar.update(len(kept))
      np.save(folder / f"{split}.npy", first + offsets_of(np.concatenate(lengths)))


def _first_images(features: FeatureSet, split: str, images: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Lengths and vectors of blocks of items, of each item no more than the first `images`."""
  for lengths, values in features.split(split):
    kept = Ragged.of_lengths(np.arange(len(values)), lengths).first(images)
    yield kept.lengths, values[kept.values]


def _ids(offsets: np.ndarray) -> Ragged:
  """Rows of the bank for each item: they stand one after the other."""
  return Ragged(np.arange(offsets[0], offsets[-1], dtype=np.int32), offsets - offsets[0])


def _memory(mesh: Mesh) -> int:
  """Bytes of a device's memory; of a CPU device its share of the machine's."""
  device = mesh.local_devices[0]
  stats = device.memory_stats() or {}
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return stats.get("bytes_limit", whole // len(mesh.local_devices))


@dataclasses.dataclass(frozen=True)
class _ZeroPadded:
  """Rows with zeros below them, read a part at a time."""

  values: np.ndarray
  num_rows: int

  @property
  def shape(self) -> tuple[int, int]:
    return self.num_rows, self.values.shape[1]

  def read(self, index) -> np.ndarray:
    rows = np.arange(self.num_rows)[index[0]]
    part = np.zeros((len(rows), self.values.shape[1]), self.values.dtype)
    known = self.values[rows[0] : min(rows[-1] + 1, len(self.values))]
    part[: len(known)] = known
    return part
