"""Packed items on the mesh: the typed input of every program that runs the encoder."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from vixml_jax import sharding
from vixml_jax.images.features import DeviceImages, ImageFeatures
from vixml_jax.input.packing import PackedImages, PackedItems
from vixml_jax.models.fusion import ImageTokens
from vixml_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderInputs:
  """Packed rows of one chunk, or of several with a leading chunk dimension.

  Attributes:
    tokens: int32 [..., R, T], token ids; any id where early fusion puts an image.
    segments: int32 [..., R, T], slot 1..S of each token's item; 0 for padding.
    positions: int32 [..., R, T], position of each token in its item.
    images: images of the rows; None for a model of texts only.
  """

  tokens: Array
  segments: Array
  positions: Array
  images: DeviceImages | None


def inputs_on_mesh(packed: PackedItems, features: ImageFeatures | None, mesh: Mesh) -> EncoderInputs:
  """Returns all chunks of packed items on the mesh, sharded by row."""
  images = None if features is None or packed.images is None else features.on_mesh(packed.images, mesh)
  where = sharding.named_sharding(mesh, "chunk", "row", "vector")
  tokens, segments, positions = (
    sharding.to_global(array, where) for array in (packed.tokens, packed.segments, packed.positions)
  )
  return EncoderInputs(tokens, segments, positions, images)


def chunk_on_mesh(packed: PackedItems, chunk: int, features: ImageFeatures | None, mesh: Mesh) -> EncoderInputs:
  """Returns one chunk of packed items, sharded by row, as the argument of a program on the mesh."""
  images = None
  if features is not None and packed.images is not None:
    of_chunk = (array[chunk] for array in (packed.images.rows, packed.images.segments, packed.images.positions))
    images = features.on_mesh(PackedImages(*of_chunk), mesh, sharding.as_argument)
  where = sharding.named_sharding(mesh, "row", "vector")
  tokens, segments, positions = (
    sharding.as_argument(array[chunk], where) for array in (packed.tokens, packed.segments, packed.positions)
  )
  return EncoderInputs(tokens, segments, positions, images)


def image_tokens(images: DeviceImages | None, features: Array | None) -> ImageTokens | None:
  """Returns the images of a chunk, or of several, with their feature vectors; None where there are no images.

  Args:
    images: images of the rows.
    features: float16 [M, F] on the devices; None where `images` brings its own features.
  """
  if images is None:
    return None
  vectors: Any = images.features if features is None else features[images.rows]
  return ImageTokens(vectors, images.segments, images.positions)
