"""What a server knows about a request besides its contents: identity, status and times."""

import dataclasses
import os
import re
import time
from typing import Any, NamedTuple

from starlette.types import Scope

_ID = re.compile(rb"[\w.:/+=-]{1,128}")
_KEY = "vixml_jax.record"


class BatchTimes(NamedTuple):
  """When a batch was taken from the queue, encoded and searched, by `time.perf_counter`, in seconds."""

  started: float
  encoded: float
  searched: float


@dataclasses.dataclass(slots=True)
class RequestRecord:
  """A request, for its log line, its metrics and its spans. It holds no text of a query.

  Attributes:
    id: Name of the request, from the client or random.
    method: HTTP method.
    path: Path without the query string.
    client: Address of the client, or of the proxy before it.
    traceparent: Trace that the client's request belongs to, a header of W3C Trace Context; None if it names none.
    started: When its headers had arrived, by `time.perf_counter`.
    has_body: Whether its body has arrived as a whole.
    ended: When the response was sent.
    status: Status of the response; 500 if none was sent.
    queries: Number of queries, or of texts to embed.
    submitted: When its queries were put into the queue; 0 if they were not.
    batches: Times of the batches that its queries were part of.
  """

  id: str
  method: str
  path: str
  client: str | None
  traceparent: str | None
  started: float
  has_body: bool = False
  ended: float = 0.0
  status: int = 500
  queries: int = 0
  submitted: float = 0.0
  batches: tuple[BatchTimes, ...] = ()

  @classmethod
  def begin(cls, scope: Scope, headers: dict[bytes, bytes]) -> "RequestRecord":
    """Returns the record of a request that has just arrived, and stores it in its scope."""
    given, trace = headers.get(b"x-request-id", b""), headers.get(b"traceparent")
    record = cls(
      id=given.decode() if _ID.fullmatch(given) else os.urandom(16).hex(),
      method=scope["method"],
      path=scope["path"],
      client=scope["client"][0] if scope.get("client") else None,
      traceparent=trace.decode("latin-1") if trace else None,
      started=time.perf_counter(),
    )
    scope[_KEY] = record
    return record

  @staticmethod
  def of(scope: Scope) -> "RequestRecord":
    """Returns the record that `begin` stored."""
    return scope[_KEY]

  def answered_by(self, batches: list[BatchTimes]) -> None:
    """Takes the times of the batches of its queries, which may share them."""
    self.batches = tuple({id(batch): batch for batch in batches}.values())

  def fields(self) -> dict[str, Any]:
    """Returns the record for a log line; times are in milliseconds."""
    fields: dict[str, Any] = {
      "request_id": self.id,
      "method": self.method,
      "path": self.path,
      "status": self.status,
      "client": self.client,
      "ms": _milliseconds(self.ended - self.started),
    }
    if self.batches:
      fields |= {
        "queries": self.queries,
        "queue_ms": _milliseconds(min(batch.started for batch in self.batches) - self.submitted),
        "encode_ms": _milliseconds(sum(batch.encoded - batch.started for batch in self.batches)),
        "search_ms": _milliseconds(sum(batch.searched - batch.encoded for batch in self.batches)),
      }
    return fields


def _milliseconds(seconds: float) -> float:
  return round(1000 * seconds, 2)
