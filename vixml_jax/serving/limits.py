"""What a server takes from one request, and from all of them together."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits that are checked before any work is done.

  Attributes:
    body_bytes: of a request's body.
    body_values: of its brackets, commas and colons, which bounds what JSON can unfold to.
    body_seconds: in which a body must have come.
    bodies_bytes: of all bodies that are being read or answered.
    queries: of a request.
    k: labels a query.
    text_chars: characters of a text or a name.
    images: of a query.
    names: in each list of a filter.
    batch: queries that are encoded and searched together.
    wait_seconds: a query waits for others to share its batch.
    queue: queries that wait for the devices.
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
  wait_seconds: float = 0.005
  queue: int = 1_024
