"""Encodes images with a vision tower: threads decode and resize images while the devices compute."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.images.decoding import MISSING, UNREADABLE, BadImage, decode
from vixml_jax.images.feature_parts import FeaturePart
from vixml_jax.images.feature_set import to_float16
from vixml_jax.images.preprocess import PREPROCESSING, PROCESSOR
from vixml_jax.images.processor import choose_preprocessing, read_processor
from vixml_jax.images.sources import ImageSource
from vixml_jax.models.parameters import merge_params
from vixml_jax.models.vision import define_vision, feature_size
from vixml_jax.stages import counted
from vixml_jax.typing import Array, Tree
from vixml_jax.weights.vision import find_checkpoint, load_tower

# Batches on the devices at a time: the host collects one batch while the devices compute the next.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImage:
  """An image that has been decoded and resized for a tower; `ImageTower.prepare` makes it.

  Attributes:
    pixels: uint8 [size, size, 3].
  """

  pixels: np.ndarray


class _Place(NamedTuple):
  """The part of a source, the row and the slot that an image belongs to."""

  part: int
  row: int
  slot: int


class _Decoded(NamedTuple):
  """An image with its pixels, or with the reason why it has none."""

  place: _Place
  pixels: np.ndarray | None
  reason: str | None


class _Encoded(NamedTuple):
  """An image with its feature vector, float32 [F]; zeros where `reason` says why it has no pixels."""

  place: _Place
  reason: str | None
  vector: np.ndarray


class ImageTower:
  """A vision tower with its preprocessing, on the devices of this process.

  Attributes:
    dim: F, the size of a feature vector.
  """

  def __init__(self, checkpoint: str, variant: str | None, preprocessing: str, batch_size: int, dtype: str):
    """Loads a tower.

    Args:
      checkpoint: File, folder or name on the hub; see `load_tower`.
      variant: Name of the published tower that the checkpoint must be, or None; see `load_tower`.
      preprocessing: One of `preprocess.KINDS`.
      batch_size: Number of images per step, rounded up to a multiple of the number of devices.
      dtype: Type in which the tower computes.

    Raises:
      InputError: The checkpoint cannot be read, is not the variant, or has another preprocessing.
    """
    path = find_checkpoint(checkpoint)
    kind = choose_preprocessing(preprocessing, path)
    processor = read_processor(path) if kind == PROCESSOR else None
    params, arguments = load_tower(path, variant=variant, image_size=processor.size if processor else None)
    graphdef, _, _ = define_vision(arguments | {"dtype": dtype})
    devices = jax.local_devices()
    mesh = sharding.make_mesh(devices=devices)
    self.dim: int = feature_size(arguments)
    self._checkpoint = checkpoint
    self._size: int = arguments["image_size"]
    self._preprocess: Callable[[np.ndarray], np.ndarray] = processor or (
      lambda pixels: PREPROCESSING[kind](pixels, self._size)
    )
    # big_vision's value_range and the processors of SigLIP map 0..255 to -1..1.
    mean, std = (processor.mean, processor.std) if processor else (0.5, 0.5)
    self._batch_size = -(-batch_size // len(devices)) * len(devices)
    # The towers are small enough (0.1 to 1.2 billion parameters) for each device to hold one.
    self._params = jax.device_put(params, sharding.named_sharding(mesh))
    self._rows = sharding.named_sharding(mesh, "row")

    def encode(params: Tree, pixels: Array) -> Array:
      normalized = (pixels.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
      return merge_params(graphdef, params)(normalized)

    self._encode = jax.jit(encode, out_shardings=self._rows)

  def prepare(self, blob: bytes) -> PreparedImage:
    """Decodes an image and resizes it for this tower. Several threads may call it at once.

    Args:
      blob: PNG, JPEG, WebP, GIF or BMP file.

    Raises:
      BadImage: The image has no pixels.
    """
    return PreparedImage(self._preprocess(decode(blob)))

  def encode(self, images: Sequence[bytes | Path | PreparedImage]) -> tuple[np.ndarray, list[str | None]]:
    """Encodes images that are in memory or in files.

    The features are those that `encode_parts` computes for a source with one part that holds the same images.

    Args:
      images: Encoded images, paths of files with encoded images, or images that `prepare` made.

    Returns:
      Features, float16 [images, F], which are zeros for an image without pixels; and for each image None or the
      reason (one of `decoding.REASONS`) why it has no pixels.

    Raises:
      InputError: float16 cannot hold the output of the tower.
    """
    part = self._feature_part(list(self._encoded((_Place(0, row, 0), image) for row, image in enumerate(images))))
    return part.features, part.reasons

  def encode_parts(self, source: ImageSource, numbers: Sequence[int], name: str) -> Iterator[tuple[int, FeaturePart]]:
    """Encodes parts of a source in order. Images of the next part are decoded meanwhile.

    Args:
      source: Images of one split.
      numbers: Ascending numbers of the parts.
      name: Name of the images in the progress bar.

    Yields:
      Number and features of each part. A part without images has features of shape [0, F].

    Raises:
      InputError: float16 cannot hold the output of the tower.
    """
    images = (
      (_Place(number, image.row, image.slot), image.blob) for number, piece in source.read(numbers) for image in piece
    )
    encoded = counted(self._encoded(images), f"encode {name} images", total=None, unit="image")
    empty = dict.fromkeys(numbers)
    for number, group in itertools.groupby(encoded, key=lambda image: image.place.part):
      del empty[number]
      yield number, self._feature_part(list(group))
    for number in empty:
      yield number, self._feature_part([])

  def _feature_part(self, images: list[_Encoded]) -> FeaturePart:
    values = to_float16(np.stack([image.vector for image in images])) if images else np.zeros((0, self.dim), np.float16)
    if values is None:
      raise InputError(
        f"{self._checkpoint}: its features are not finite or exceed float16; check that its weights are not damaged, "
        "or try --dtype=float32"
      )
    return FeaturePart(
      np.array([image.place.row for image in images], np.int64),
      np.array([image.place.slot for image in images], np.int32),
      [image.reason for image in images],
      values,
    )

  def _encoded(self, images: Iterable[tuple[_Place, bytes | Path | PreparedImage | None]]) -> Iterator[_Encoded]:
    """Yields every image in order with its vector."""
    pending: deque[tuple[list[_Decoded], Array | None]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
      for batch in self._batches(self._decoded(images, pool)):
        pending.append((batch, self._start(batch)))
        if len(pending) > _IN_FLIGHT:
          yield from self._collect(*pending.popleft())
      for batch, output in pending:
        yield from self._collect(batch, output)

  def _decoded(
    self, images: Iterable[tuple[_Place, bytes | Path | PreparedImage | None]], pool: ThreadPoolExecutor
  ) -> Iterator[_Decoded]:
    """Yields every image in order with its pixels; at most two batches are decoded in advance."""
    waiting: deque[Future[_Decoded]] = deque()
    for place, image in images:
      waiting.append(pool.submit(self._decode, place, image))
      if len(waiting) > 2 * self._batch_size:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()

  def _decode(self, place: _Place, image: bytes | Path | PreparedImage | None) -> _Decoded:
    if image is None:
      return _Decoded(place, None, MISSING)
    try:
      if not isinstance(image, PreparedImage):
        image = self.prepare(image.read_bytes() if isinstance(image, Path) else image)
      return _Decoded(place, image.pixels, None)
    except BadImage as error:
      return _Decoded(place, None, str(error))
    except OSError:
      return _Decoded(place, None, UNREADABLE)

  def _batches(self, decoded: Iterable[_Decoded]) -> Iterator[list[_Decoded]]:
    """Yields consecutive images, in lists of which at most `batch_size` have pixels."""
    batch: list[_Decoded] = []
    with_pixels = 0
    for image in decoded:
      batch.append(image)
      with_pixels += image.pixels is not None
      if with_pixels == self._batch_size:
        yield batch
        batch, with_pixels = [], 0
    if batch:
      yield batch

  def _start(self, images: list[_Decoded]) -> Array | None:
    """Sends a batch to the devices and does not wait. A batch with too few images is filled with black ones."""
    pixels = [image.pixels for image in images if image.pixels is not None]
    if not pixels:
      return None
    batch = np.zeros((self._batch_size, self._size, self._size, 3), np.uint8)
    np.stack(pixels, out=batch[: len(pixels)])
    return self._encode(self._params, jax.device_put(batch, self._rows))

  def _collect(self, images: list[_Decoded], output: Array | None) -> Iterator[_Encoded]:
    """Waits for a batch; `output` is float32 [batch_size, F], or None if no image has pixels."""
    vectors = iter(() if output is None else np.asarray(output))
    zeros = np.zeros(self.dim, np.float32)
    for image in images:
      yield _Encoded(image.place, image.reason, zeros if image.reason else next(vectors))
