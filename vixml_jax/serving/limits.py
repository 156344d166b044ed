"""Limits of what a server accepts on one connection, in one request, of one client, and in all."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits that are checked before any work is done.

  Attributes:
    body_bytes: Maximum size of a request's body.
    body_values: Maximum number of opening brackets, commas and colons in a body, which bounds the size of the parsed
      JSON.
    body_seconds: Maximum time until a body has arrived.
    bodies_bytes: Maximum size of all bodies and responses that are being read, answered or sent; those of one client
      may have a quarter of it.
    queries: Maximum number of queries in a request.
    k: Maximum number of labels for each query.
    text_chars: Maximum number of characters of a text or a name.
    images: Maximum number of images of a query.
    pixels: Maximum number of pixels of all images that a request has, and that requests of one client have at a time.
      All requests together have at most four times as many; others wait.
    names: Maximum number of names in each list of a filter.
    batch: Maximum number of queries that are encoded and searched together.
    batch_tokens: Maximum number of tokens of such queries, images included; a single query may have more.
    queue: Maximum number of queries that wait for the devices; those of one client may be half of it.
    answer_seconds: Maximum time from the arrival of a body to its answer.
    connections: Maximum number of open connections.
    client_connections: Maximum number of those of one client.
    head_bytes: Maximum size of a request's first line and headers.
    head_fields: Maximum number of headers.
    head_seconds: Maximum time from the first byte of a request to the end of its headers.
    idle_seconds: Maximum time without a request on an open connection.
    response_seconds: Maximum time in which a client takes half of what is left of a response.
    pipelined: Maximum number of requests that wait on a connection for the one before them.
  """

  body_bytes: int = 16 * 2**20
  body_values: int = 250_000
  body_seconds: float = 30.0
  bodies_bytes: int = 512 * 2**20
  queries: int = 64
  k: int = 100
  text_chars: int = 10_000
  images: int = 8
  pixels: int = 64 * 2**20
  names: int = 1_000
  batch: int = 64
  batch_tokens: int = 2_048
  queue: int = 1_024
  answer_seconds: float = 60.0
  connections: int = 1_024
  client_connections: int = 256
  head_bytes: int = 32 * 2**10
  head_fields: int = 100
  head_seconds: float = 10.0
  idle_seconds: float = 60.0
  response_seconds: float = 30.0
  pipelined: int = 16

  @property
  def client_bytes(self) -> int:
    """Maximum size of the bodies and responses of one client."""
    return max(self.bodies_bytes // 4, self.body_bytes)

  @property
  def client_queue(self) -> int:
    """Maximum number of queries of one client that wait for the devices."""
    return max(self.queue // 2, self.queries)
