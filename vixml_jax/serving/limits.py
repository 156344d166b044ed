"""Limits of what a server accepts in one request and in all requests together."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits that are checked before any work is done.

  Attributes:
    body_bytes: Maximum size of a request's body.
    body_values: Maximum number of opening brackets, commas and colons in a body, which bounds the size of the parsed
      JSON.
    body_seconds: Maximum time until a body has arrived.
    bodies_bytes: Maximum size of all bodies that are being read or answered.
    queries: Maximum number of queries in a request.
    k: Maximum number of labels for each query.
    text_chars: Maximum number of characters of a text or a name.
    images: Maximum number of images of a query.
    names: Maximum number of names in each list of a filter.
    batch: Maximum number of queries that are encoded and searched together.
    batch_tokens: Maximum number of tokens of such queries, images included; a single query may have more.
    queue: Maximum number of queries that wait for the devices.
  """

  body_bytes: int = 16 * 2**20
  body_values: int = 250_000
  body_seconds: float = 30.0
  bodies_bytes: int = 512 * 2**20
  queries: int = 64
  k: int = 100
  text_chars: int = 10_000
  images: int = 8
  names: int = 1_000
  batch: int = 64
  batch_tokens: int = 2_048
  queue: int = 1_024
