"""Connections of a server: how many there may be, how long they may take, and how large the heads of requests may be.

uvicorn reads HTTP, and has no limits for clients that send slowly, read slowly, or send heads without end.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
import ipaddress
import json
import socket
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vixml_jax.errors import InputError
from vixml_jax.serving.budgets import client_name
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics

_LINGER_SECONDS = 2.0  # A client that still sends does not see a response after which the connection is closed at once.
_PROBE_SECONDS = 0.2
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connections:
  """The open connections of a server.

  Those without a request are closed when others need their place, the one that has waited longest first.
  """

  def __init__(self, limits: Limits, metrics: Metrics, proxies: Sequence[str] = ()):
    """Starts without connections.

    Args:
      limits: Limits of connections.
      metrics: Metrics to count connections in.
      proxies: Addresses and networks of proxies, whose connections are those of many clients.

    Raises:
      InputError: A proxy is neither.
    """
    self.limits, self._metrics = limits, metrics
    self._proxies = [_network(proxy) for proxy in proxies]
    self._clients: dict[GuardedProtocol, str | None] = {}
    self._numbers: Counter[str | None] = Counter()
    self._idle: dict[GuardedProtocol, None] = {}  # The longest first.
    metrics.connections.set_function(lambda: len(self._clients))

  def add(self, connection: "GuardedProtocol", address: str) -> bool:
    """Adds a connection, or returns False if there are too many."""
    client, limits = None if self._is_proxy(address) else client_name(address), self.limits
    if client is not None and self._numbers[client] >= limits.client_connections:
      room = self._make_room([each for each in self._idle if self._clients[each] == client])
    else:
      room = len(self._clients) < limits.connections or self._make_room(list(self._idle))
    if not room:
      return False
    self._clients[connection] = client
    self._numbers[client] += 1
    self._idle[connection] = None
    return True

  def remove(self, connection: "GuardedProtocol") -> None:
    """Removes a connection that has been closed; a second time, it does nothing."""
    if connection in self._clients:
      client = self._clients.pop(connection)
      self._numbers[client] -= 1
      if not self._numbers[client]:
        del self._numbers[client]
      self._idle.pop(connection, None)

  def set_idle(self, connection: "GuardedProtocol", idle: bool) -> None:
    """Takes note that a connection has no request, or has one."""
    self._idle.pop(connection, None)
    if idle and connection in self._clients:
      self._idle[connection] = None

  def count(self, reason: str) -> None:
    """Counts a connection that the server ends."""
    self._metrics.ended_connections.labels(reason).inc()

  def _make_room(self, idle: "Sequence[GuardedProtocol]") -> bool:
    if idle:
      idle[0].end("evicted")
      self.remove(idle[0])
    return bool(idle)

  def _is_proxy(self, address: str) -> bool:
    if not self._proxies:
      return False
    parsed = ipaddress.ip_address(address)
    return any(parsed in proxy for proxy in self._proxies)


def _network(proxy: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
  try:
    return ipaddress.ip_network(proxy)
  except ValueError as error:
    raise InputError(f"--proxies={proxy}: must be an address or a network, such as 10.0.0.1 or 10.0.0.0/8") from error


class _Wait(NamedTuple):
  """What a connection is waiting for, and what was unsent when it began to wait."""

  reason: str
  unsent: int


class GuardedProtocol(HttpToolsProtocol):
  """A connection with limits. `protocol_class` makes a subclass for one server."""

  doors: Connections

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    """Called when a client has connected."""
    super().connection_made(transport)
    self._in_head, self._in_body, self._deaf = True, False, False
    self._stalled, self._progress = 0, False
    self._timer: asyncio.TimerHandle | None = None
    self._wait: _Wait | None = None
    if self.doors.add(self, self.client[0] if self.client else "127.0.0.1"):
      self._settle()
    else:
      self._refuse(503, "too many connections; try again later", "too many", linger=False)

  def connection_lost(self, exc: Exception | None) -> None:
    """Called when the connection has been closed by either side."""
    self._stop_waiting()
    self.doors.remove(self)
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    """Called when bytes have arrived."""
    if self._deaf:
      return
    if self._wait is not None and self._wait.reason == "idle":
      self._wait_for("slow head", self.doors.limits.head_seconds)
    self._progress = False
    super().data_received(data)
    # Heads, sizes of chunks and trailers are bytes without progress. httptools keeps those that are incomplete.
    self._stalled = 0 if self._progress else self._stalled + len(data)
    if self._stalled > self.doors.limits.head_bytes:
      self._refuse_head()

  def on_header(self, name: bytes, value: bytes) -> None:
    """Called with a header, or with a field after a chunked body, which is left out."""
    if self._in_head:
      super().on_header(name, value)

  def on_headers_complete(self) -> None:
    """Called when the head of a request is complete."""
    limits = self.doors.limits
    self._progress, self._in_head = True, False
    size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
    if self._deaf:
      return
    if len(self.headers) > limits.head_fields or size > limits.head_bytes:
      self._refuse_head()
    elif sum(name == b"host" for name, _ in self.headers) > 1:
      self._refuse(400, "has more than one Host header", "invalid")
    elif len(self.pipeline) >= limits.pipelined:
      self._hear_no_more("too many at once")
    else:
      self._in_body = True
      self.doors.set_idle(self, False)
      super().on_headers_complete()
      self._settle()

  def on_body(self, body: bytes) -> None:
    """Called with a part of a body."""
    self._progress = True
    if not self._deaf:
      super().on_body(body)

  def on_message_complete(self) -> None:
    """Called when a request has arrived as a whole."""
    self._progress, self._in_head, self._in_body = True, True, False
    if not self._deaf:
      super().on_message_complete()
      self._settle()

  def on_response_complete(self) -> None:
    """Called when a response has been written, though perhaps not sent."""
    super().on_response_complete()
    self._settle()

  def pause_writing(self) -> None:
    """Called when the client takes a response more slowly than it is written."""
    super().pause_writing()
    self._settle()

  def resume_writing(self) -> None:
    """Called when the client has taken most of what was written."""
    super().resume_writing()
    self._settle()

  def eof_received(self) -> bool | None:  # type: ignore[override]
    """Called when the client has closed its side; returns whether to keep ours open, for a response.

    A client that has left altogether closes its side as well. It answers anything that it is sent by a reset, so it is
    sent the interim response 100, which others ignore.
    """
    if not self._answering() or (self._in_body and not self._deaf):
      self._forget_client()
      return None
    self._hear_no_more()
    if not self.cycle.response_started and self.cycle.scope["http_version"] == "1.1":
      self.transport.write(_CONTINUE)
    self.loop.call_later(_PROBE_SECONDS, self._probe)
    return True

  def send_400_response(self, msg: str) -> None:
    """Called for bytes that are not HTTP."""
    self._refuse(400, "is not a valid HTTP request", "invalid")

  def end(self, reason: str | None) -> None:
    """Closes the connection without a response, and counts the reason if there is one."""
    if reason:
      self.doors.count(reason)
    self._stop_waiting()
    self._deaf = True
    self._forget_client()
    self.transport.abort()

  def _forget_client(self) -> None:
    """Lets the application know at once that no one reads what it writes: the transport may not be written to."""
    if self.cycle is not None:
      self.cycle.disconnected = True
      self.cycle.message_event.set()
    for waiting, _ in self.pipeline:
      waiting.disconnected = True

  def _answering(self) -> bool:
    return self.cycle is not None and not self.cycle.response_complete

  def _settle(self) -> None:
    """Waits for what comes next, for a limited time."""
    limits = self.doors.limits
    if self._unsent() and (not self._answering() or self.flow.write_paused):
      self._wait_for("response not read", limits.response_seconds)
    elif self._answering():
      self._stop_waiting()
    elif self._deaf:
      pass  # The connection is being closed.
    elif self._in_body:
      self._wait_for("body not ended", limits.body_seconds)
    else:
      self.doors.set_idle(self, True)
      self._wait_for("idle", limits.idle_seconds)

  def _wait_for(self, reason: str, seconds: float) -> None:
    if self._wait is not None and self._wait.reason == reason != "idle":
      return  # It is not a new one.
    self._stop_waiting()
    self._wait = _Wait(reason, self._unsent())
    self._timer = self.loop.call_later(seconds, self._expire)

  def _stop_waiting(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
    self._timer = self._wait = None

  def _expire(self) -> None:
    wait, self._wait = self._wait, None
    assert wait is not None
    if wait.reason == "response not read" and self._unsent() <= wait.unsent // 2:
      self._settle()
    elif wait.reason == "slow head":
      self._refuse(408, f"the headers did not arrive within {self.doors.limits.head_seconds:g} s", wait.reason)
    else:
      self.end(None if wait.reason == "refused" else wait.reason)  # It was counted when it was refused.

  def _unsent(self) -> int:
    return self.transport.get_write_buffer_size()

  def _refuse_head(self) -> None:
    limits = self.doors.limits
    message = f"the headers have more than {limits.head_bytes:,} bytes or {limits.head_fields} lines; send fewer"
    self._refuse(431, message, "large head")

  def _refuse(self, status: int, message: str, reason: str, linger: bool = True) -> None:
    """Answers without the application, and closes the connection."""
    if self._answering() and self._in_body:  # It is not known where the request ends.
      self.end(reason)
      return
    if self._answering():  # Requests before this one are answered.
      self._hear_no_more(reason)
      return
    self.doors.count(reason)
    self._deaf = True
    self.doors.set_idle(self, False)
    body = json.dumps({"error": {"field": None, "message": message}}).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    self.transport.write(STATUS_LINE[status] + head.encode() + body)
    if linger and self.transport.can_write_eof():
      self.transport.write_eof()
      self._stop_waiting()
      self._wait_for("refused", _LINGER_SECONDS)
    else:
      self.transport.close()

  def _hear_no_more(self, reason: str | None = None) -> None:
    """Ignores what the client sends from now on, and closes the connection after the last response."""
    if reason:
      self.doors.count(reason)
    self._deaf = True
    (self.pipeline[0][0] if self.pipeline else self.cycle).keep_alive = False

  def _probe(self) -> None:
    """Ends the connection if the client has left, and looks again later otherwise."""
    if self.transport.is_closing():
      return
    connection = self.transport.get_extra_info("socket")
    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
      self.end("left")
    elif self._answering():
      self.loop.call_later(_PROBE_SECONDS, self._probe)


def protocol_class(connections: Connections) -> type[GuardedProtocol]:
  """Returns the class of the connections of a server, which uvicorn makes."""
  members: dict[str, Any] = {"doors": connections}
  return type("ServerProtocol", (GuardedProtocol,), members)
