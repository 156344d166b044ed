"""Encodes images with SigLIP: threads decode and resize them while the devices compute."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.images.decoding import MISSING, UNREADABLE, BadImage, decode
from vixml_jax.images.feature_parts import FeaturePart
from vixml_jax.images.feature_set import to_float16
from vixml_jax.images.preprocess import PREPROCESSING
from vixml_jax.images.sources import ImageSource
from vixml_jax.models import layers
from vixml_jax.models.siglip import define_siglip
from vixml_jax.typing import Array
from vixml_jax.weights.siglip import load_siglip

# Batches in flight: threads decode and the host collects while the devices compute.
_IN_FLIGHT = 2


class _Image(NamedTuple):
  """An image on its way: where it belongs, and why it has no pixels (None if it has)."""

  part: int
  row: int
  slot: int
  reason: str | None


class ImageTower:
  """A SigLIP tower on this process's devices, with its pre-processing.

  Args:
    checkpoint: as `load_siglip` takes it.
    variant: as `load_siglip` takes it.
    preprocessing: of `PREPROCESSING`.
    batch_size: images a step, rounded up to a multiple of the devices.
    dtype: in which the tower computes.

  Attributes:
    dim: F.
  """

  def __init__(self, checkpoint: str, variant: str | None, preprocessing: str, batch_size: int, dtype: str):
    params, arguments = load_siglip(checkpoint, variant=variant)
    graphdef, _, _ = define_siglip(arguments | {"dtype": dtype})
    devices = jax.local_devices()
    mesh = sharding.make_mesh(devices=devices)
    self.dim: int = arguments["embed_dim"]
    self._checkpoint = checkpoint
    self._size: int = arguments["image_size"]
    self._preprocess = PREPROCESSING[preprocessing]
    self._batch_size = -(-batch_size // len(devices)) * len(devices)
    # The towers are small enough (0.1 to 1.2 billion parameters) for each device to hold one.
    self._params = jax.device_put(params, sharding.named_sharding(mesh))
    self._rows = sharding.named_sharding(mesh, "row")

    def encode(params, pixels):
      # What big_vision's value_range and Hugging Face's rescaling and normalizing both come to.
      return layers.merge_params(graphdef, params)(pixels.astype(jnp.float32) / 255 * 2 - 1)

    self._encode = jax.jit(encode, out_shardings=self._rows)

  def encode_parts(self, source: ImageSource, numbers: Sequence[int], name: str) -> Iterator[tuple[int, FeaturePart]]:
    """Encodes parts of a source one after the other; the next one's images are decoded meanwhile.

    Args:
      source: images of one split.
      numbers: ascending numbers of the parts.
      name: what the progress bar calls them.

    Yields:
      Each part's number and features, also for a part without images.

    Raises:
      InputError: the tower's output is not finite.
    """
    empty = dict.fromkeys(numbers)
    images: list[_Image] = []
    vectors: list[np.ndarray] = []
    with tqdm(desc=f"encode {name} images", unit=" images", disable=None, leave=False) as bar:
      for image, vector in self._encoded(source, numbers):
        if images and image.part != images[-1].part:
          yield self._part(images, vectors)
          images, vectors = [], []
        empty.pop(image.part, None)
        images.append(image)
        vectors.append(vector)
        bar.update()
    if images:
      yield self._part(images, vectors)
    for number in empty:
      yield number, _make_part([], np.zeros((0, self.dim), np.float16))

  def _part(self, images: list[_Image], vectors: list[np.ndarray]) -> tuple[int, FeaturePart]:
    values = to_float16(np.stack(vectors))
    if values is None:
      raise InputError(
        f"{self._checkpoint}: gives features that float16 cannot hold; are its weights damaged? If not, "
        "try --dtype=float32"
      )
    return images[0].part, _make_part(images, values)

  def _encoded(self, source: ImageSource, numbers: Sequence[int]) -> Iterator[tuple[_Image, np.ndarray]]:
    """Every image in order with its float32 vector [F]: zeros if it has no pixels."""
    pending: deque[tuple[list[_Image], Array | None]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
      for images, pixels in self._batches(self._decoded(source, numbers, pool)):
        pending.append((images, self._start(pixels)))
        if len(pending) > _IN_FLIGHT:
          yield from self._collect(*pending.popleft())
      for batch in pending:
        yield from self._collect(*batch)

  def _decoded(
    self, source: ImageSource, numbers: Sequence[int], pool: ThreadPoolExecutor
  ) -> Iterator[tuple[_Image, np.ndarray | None]]:
    """Every image in order with its pixels; up to two batches are decoded ahead of what is asked for."""
    waiting: deque = deque()

    def oldest() -> tuple[_Image, np.ndarray | None]:
      part, row, slot, future = waiting.popleft()
      pixels, reason = future.result()
      return _Image(part, row, slot, reason), pixels

    for part, images in source.read(numbers):
      for row, slot, blob in images:
        waiting.append((part, row, slot, pool.submit(_pixels, blob, self._preprocess, self._size)))
        if len(waiting) > 2 * self._batch_size:
          yield oldest()
    while waiting:
      yield oldest()

  def _batches(self, decoded: Iterable[tuple[_Image, np.ndarray | None]]) -> Iterator[tuple[list[_Image], list]]:
    """Runs of images of which at most `batch_size` have pixels, and those pixels."""
    images: list[_Image] = []
    pixels: list[np.ndarray] = []
    for image, square in decoded:
      images.append(image)
      if square is not None:
        pixels.append(square)
      if len(pixels) == self._batch_size:
        yield images, pixels
        images, pixels = [], []
    if images:
      yield images, pixels

  def _start(self, pixels: list[np.ndarray]) -> Array | None:
    """Sends a batch to the devices and does not wait; what is missing to a whole batch is black."""
    if not pixels:
      return None
    batch = np.zeros((self._batch_size, self._size, self._size, 3), np.uint8)
    np.stack(pixels, out=batch[: len(pixels)])
    return self._encode(self._params, jax.device_put(batch, self._rows))

  def _collect(self, images: list[_Image], output: Array | None) -> Iterator[tuple[_Image, np.ndarray]]:
    vectors = iter(() if output is None else np.asarray(output))
    none = np.zeros(self.dim, np.float32)
    for image in images:
      yield image, none if image.reason else next(vectors)


def _pixels(
  blob: bytes | Path | None, preprocess: Callable[[np.ndarray, int], np.ndarray], size: int
) -> tuple[np.ndarray | None, str | None]:
  """Pixels of an image, or why it has none."""
  if blob is None:
    return None, MISSING
  try:
    return preprocess(decode(blob.read_bytes() if isinstance(blob, Path) else blob), size), None
  except BadImage as error:
    return None, str(error)
  except OSError:
    return None, UNREADABLE


def _make_part(images: list[_Image], values: np.ndarray) -> FeaturePart:
  return FeaturePart(
    np.array([image.row for image in images], np.int64),
    np.array([image.slot for image in images], np.int32),
    [image.reason for image in images],
    values,
  )
