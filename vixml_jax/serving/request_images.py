"""Images of requests: their headers tell their size, which is checked before they are decoded within a budget."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses

import numpy as np

from vixml_jax.images.decoding import BadImage, count_pixels, from_data_uri
from vixml_jax.images.tower import PreparedImage
from vixml_jax.inference.queries import QueryImage
from vixml_jax.inference.query_images import QueryImageEncoder
from vixml_jax.serving.engine import QueryRequest
from vixml_jax.serving.request_error import RequestError

_LEAST_PIXELS = 2**17  # A prepared image takes the memory of about that many, however small the image was.


def read_image(
  given: str | list[float], where: str, encoder: QueryImageEncoder | None, pixels: int
) -> tuple[bytes | np.ndarray, int]:
  """Returns an encoded image and its number of pixels, or a feature vector and 0. A text is never used as a path.

  Args:
    given: An image of a request.
    where: Its name in error messages.
    encoder: What will encode it; None if the server does not read image files.
    pixels: How many pixels it may have.

  Raises:
    RequestError: It is not an image, or has too many pixels.
  """
  if isinstance(given, list):
    with np.errstate(over="ignore"):  # `QueryFormat.parse` refuses infinity.
      return np.asarray(given, np.float32), 0
  if encoder is None:
    raise RequestError(422, "this server does not read image files; leave them out", where)
  try:
    blob = from_data_uri(given)
    found = count_pixels(blob)
  except (ValueError, BadImage) as error:
    raise RequestError(422, str(error) if isinstance(error, BadImage) else f"is {error}", where) from error
  if found > pixels:
    raise RequestError(422, "the images of the request have too many pixels; send fewer or smaller ones", where)
  return blob, found


def pixels_to_decode(queries: Sequence[QueryRequest], most: int) -> int:
  """Returns what the images of a request take from the budget of pixels, at most `most`; 0 without encoded images."""
  images = sum(isinstance(image, bytes) for request in queries for image in request.query.images)
  return min(max(sum(request.pixels for request in queries), images * _LEAST_PIXELS), most)


async def prepare_images(
  queries: Sequence[QueryRequest],
  prepare: Callable[[bytes], PreparedImage],
  pool: ThreadPoolExecutor,
  started: Callable[[Future], None],
) -> list[QueryRequest]:
  """Returns queries whose encoded images are decoded, one after another. If it is cancelled, no further one is decoded.

  Args:
    queries: Queries of a request.
    prepare: Function that decodes an image.
    pool: Threads that call it.
    started: Function that gets each job.

  Raises:
    RequestError: An image is damaged.
  """
  prepared = []
  for request in queries:
    images: list[QueryImage] = list(request.query.images)
    for i, image in enumerate(request.query.images):
      if isinstance(image, bytes):
        job = pool.submit(prepare, image)
        started(job)
        try:
          prepared_image = await asyncio.wrap_future(job)
        except BadImage as error:
          raise RequestError(422, str(error), f"{request.query.where}.images[{i}]") from error
        images[i] = prepared_image
    prepared.append(dataclasses.replace(request, query=dataclasses.replace(request.query, images=tuple(images))))
  return prepared
