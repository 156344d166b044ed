"""What every request passes before its route: its record, the checks of its headers, and headers of its response."""

from collections.abc import Awaitable, Callable, Sequence
import time

from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Receive, Scope, Send

from vixml_jax.serving.access import Access
from vixml_jax.serving.budgets import Budget, Share
from vixml_jax.serving.failures import failure
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.request_record import RequestRecord

AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN_PATHS = frozenset(("/healthz", "/readyz", "/", "/page.css", "/page.js"))
"""Paths that need no API key: what probes ask, and the page, which asks its user for the key."""
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")


class Gate:
  """Middleware around all others. It does little for each request, because queries are answered in milliseconds."""

  def __init__(
    self,
    app: AsgiApp,
    access: Access,
    limits: Limits,
    metrics: Metrics,
    observers: Sequence[Callable[[RequestRecord], None]] = (),
  ):
    """Wraps an application.

    Args:
      app: The application.
      access: Who may use the server.
      limits: Limits of the bytes of all requests.
      metrics: Metrics that count and time requests by route; all unknown paths count as one route.
      observers: Functions that get the record of each request after its response was sent.
    """
    self._access, self._metrics, self._observers = access, metrics, observers
    self._bytes = Budget(limits.bodies_bytes, limits.client_bytes)
    self._app: AsgiApp = _Guard(app, access)
    if access.origins:
      self._app = CORSMiddleware(
        self._app,
        allow_origins=access.origins,
        allow_methods=("GET", "POST"),
        allow_headers=("authorization", "content-type", "x-request-id"),
        expose_headers=("x-request-id",),
      )

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    headers = dict(scope["headers"])
    record, share = RequestRecord.begin(scope, headers), Share.begin(scope, self._bytes)

    async def sent(message: Message) -> None:
      if message["type"] == "http.response.start":
        record.status = message["status"]
        message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode()), _NO_SNIFFING]
      await send(message)

    try:
      if self._access.knows_host(headers.get(b"host", b"")):
        await self._app(scope, receive, sent)
      else:
        error = RequestError(421, "the Host header does not name this server; allow the name with --allowed_hosts")
        await failure(error, record.path)(scope, receive, sent)
    finally:
      share.resize(0)
      record.ended = time.perf_counter()
      route = getattr(scope.get("route"), "path", "other")
      self._metrics.requests.labels(route, record.status).inc()
      self._metrics.request_seconds.labels(route).observe(record.ended - record.started)
      for observe in self._observers:
        observe(record)


class _Guard:
  """Refuses requests without a valid key, and bodies that are not declared as JSON.

  A page of another site can send a form or plain text here without asking first, but not JSON.
  """

  def __init__(self, app: AsgiApp, access: Access):
    self._app, self._access = app, access

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    error = self._error(scope, dict(scope["headers"])) if scope["type"] == "http" else None
    if error is None:
      await self._app(scope, receive, send)
    else:
      await failure(error, scope["path"])(scope, receive, send)

  def _error(self, scope: Scope, headers: dict[bytes, bytes]) -> RequestError | None:
    needs_key = self._access.key_digests and scope["path"] not in OPEN_PATHS
    if needs_key and not self._access.knows_key(headers.get(b"authorization", b"")):
      return RequestError(401, "needs the header `Authorization: Bearer KEY` with a valid API key")
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if scope["method"] == "POST" and kind != b"application/json":
      return RequestError(415, "the body must be JSON; send the header `Content-Type: application/json`")
    return None
