"""Connections that are silent, slow, half-closed, too many or send without end are limited; good ones are answered."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn

from tests.helpers.http_server import wait_for
from vixml_jax.errors import InputError
from vixml_jax.serving.connections import Connections, protocol_class
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics

_LIMITS = Limits(
  connections=50,
  client_connections=40,
  head_bytes=4_096,
  head_fields=20,
  head_seconds=0.6,
  idle_seconds=1.0,
  body_seconds=1.0,
  response_seconds=0.5,
  pipelined=4,
)
_LARGE = 32 * 2**20  # More than the buffers of the kernel hold.


class _Served:
  """A small application behind guarded connections."""

  def __init__(self, limits=_LIMITS, proxies=()):
    self.metrics, self.left, self.answered, self.fields = Metrics(), threading.Event(), 0, []
    self.connections = Connections(limits, self.metrics, proxies)
    self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    self.port = self._listening.getsockname()[1]
    config = uvicorn.Config(
      self._app,
      http=protocol_class(self.connections),
      interface="asgi3",
      ws="none",
      lifespan="off",
      log_config=None,
      log_level="error",
      timeout_graceful_shutdown=5,
    )
    self.server = uvicorn.Server(config)
    self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listening]})

  async def _app(self, scope, receive, send):
    self.fields = scope["headers"]
    body, message = b"", await receive()
    while message["type"] == "http.request":
      body += message["body"]
      if not message["more_body"]:
        break
      message = await receive()
    if scope["path"] == "/wait":
      leaving = asyncio.ensure_future(receive())
      await asyncio.wait([leaving], timeout=2)
      if leaving.done():
        self.left.set()
      leaving.cancel()
    self.answered += 1
    content = b"x" * _LARGE if scope["path"] == "/large" else b"%d" % len(body)
    fields = [(b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": content, "more_body": True})
    await send({"type": "http.response.body"})

  def connect(self, address="127.0.0.1", receive_buffer=None):
    connection = socket.socket()
    if receive_buffer:
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.bind((address, 0))
    connection.settimeout(10)
    connection.connect(("127.0.0.1", self.port))
    return connection

  def ended(self, reason):
    """Number of connections that the server ended for a reason."""
    return self.metrics.registry.get_sample_value("vixml_ended_connections_total", {"reason": reason}) or 0

  def open(self):
    """Number of open connections."""
    return self.metrics.registry.get_sample_value("vixml_connections")


@contextlib.contextmanager
def _serving(*args, **options):
  served = _Served(*args, **options)
  served.thread.start()
  try:
    yield served
  finally:
    served.server.should_exit = True
    served.thread.join()


@pytest.fixture(scope="module")
def served():
  with _serving() as served:
    yield served


_GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
_POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"


def _all(connection):
  """Returns everything until the server closes."""
  parts = []
  with contextlib.suppress(ConnectionError):
    while part := connection.recv(2**16):
      parts.append(part)
  return b"".join(parts)


def _status(connection):
  head = b""
  while b"\r\n\r\n" not in head:
    part = connection.recv(1)
    if not part:
      return None
    head += part
  length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
  while length:
    length -= len(connection.recv(min(length, 2**16)))
  return int(head.split()[1])


def _works(served):
  with served.connect("127.0.0.9") as connection:
    connection.sendall(_POST)
    return _status(connection) == 200


@pytest.mark.parametrize("sent", [b"", _GET], ids=["silent", "kept alive"])
def test_an_idle_connection_is_closed_after_its_time(served, sent):
  before = served.ended("idle")
  with served.connect() as connection:
    connection.sendall(sent)
    if sent:
      assert _status(connection) == 200
    started = time.monotonic()
    assert _all(connection) == b""
    assert 0.8 < time.monotonic() - started < 5
  assert served.ended("idle") == before + 1


def test_a_head_that_arrives_byte_by_byte_is_refused_after_its_time(served):
  with served.connect() as connection:
    started, sent = time.monotonic(), 0
    with contextlib.suppress(ConnectionError):
      while time.monotonic() - started < 5:
        connection.sendall(_GET[:-2][sent : sent + 1] or b"X-A: b\r\n"[:1])
        sent += 1
        connection.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
          reply = connection.recv(2**16)
          break
    assert reply.startswith(b"HTTP/1.1 408 ") and b"headers did not arrive within 0.6 s" in reply
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
  "head",
  [
    b"GET /" + b"a" * 1_000_000,
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: " + b"x" * 1_000_000,
    b"GET / HTTP/1.1\r\n" + b"N" * 1_000_000,
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 21 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: " + b"x" * 4_096 + b"\r\n\r\n",
  ],
  ids=["path", "value", "name", "number", "just too large"],
)
def test_a_head_that_is_too_large_is_refused(served, head):
  with served.connect() as connection:
    with contextlib.suppress(ConnectionError):
      connection.sendall(head)
    reply = _all(connection)
  assert reply.startswith(b"HTTP/1.1 431 ") or (reply == b"" and len(head) > 10**5)  # A reset may overtake it.
  if reply:
    assert "4,096 bytes or 20 lines" in json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]
  assert _works(served)


def test_a_head_just_below_the_limits_is_accepted(served):
  with served.connect() as connection:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 18 + b"Cookie: " + b"x" * 3_800 + b"\r\n\r\n")
    assert _status(connection) == 200


@pytest.mark.parametrize("endless", [b"5;" + b"e" * 2**16, b"0\r\nT: " + b"t" * 2**16], ids=["extension", "trailer"])
def test_chunks_and_trailers_without_end_are_cut_off(served, endless):
  before = served.ended("large head")
  with served.connect() as connection:
    with contextlib.suppress(ConnectionError):
      connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
      time.sleep(0.2)  # What arrives with the head counts as progress.
      connection.sendall(endless)
    wait_for(lambda: served.ended("large head") == before + 1, 5)


def test_trailers_are_not_headers(served):
  with served.connect() as connection:
    connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nAuthorization: b\r\n\r\n")
    assert _status(connection) == 200
  assert {name for name, _ in served.fields} == {b"host", b"transfer-encoding"}


@pytest.mark.parametrize(
  "message",
  [
    b"\x16\x03\x01\x02\x00" * 10,
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    _POST.replace(b"Length: 3", b"Length: 3\r\nContent-Length: 4"),
    _POST.replace(b"Length: 3", b"Length: 3\r\nTransfer-Encoding: chunked"),
    b"CONNECT b:443 HTTP/1.1\r\nHost: b:443\r\n\r\n",
  ],
  ids=["TLS", "two hosts", "two lengths", "length and chunks", "tunnel"],
)
def test_what_is_not_valid_http_gets_status_400_and_the_connection_is_closed(served, message):
  with served.connect() as connection:
    connection.sendall(message)
    reply = _all(connection)
  assert reply.startswith(b"HTTP/1.1 400 ") and "error" in json.loads(reply.partition(b"\r\n\r\n")[2])
  assert _works(served)


def test_a_websocket_is_not_opened(served):
  with served.connect() as connection:
    connection.sendall(_GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n")
    assert _status(connection) == 200


def test_a_client_that_closes_its_side_after_a_request_gets_the_answer(served):
  for path in (b"/", b"/wait"):
    with served.connect() as connection:
      connection.sendall(_POST.replace(b"/", path, 1))
      connection.shutdown(socket.SHUT_WR)
      reply = _all(connection)
    assert b"HTTP/1.1 200 OK" in reply and reply.endswith(b"\r\n\r\n3")
  with served.connect() as connection:
    connection.sendall(_POST[:-1])
    connection.shutdown(socket.SHUT_WR)
    assert _all(connection) == b""


@pytest.mark.parametrize("reset", [False, True])
def test_the_application_learns_that_a_client_has_left(served, reset):
  served.left.clear()
  connection = served.connect()
  connection.sendall(_POST.replace(b"/", b"/wait", 1))
  time.sleep(0.1)
  if reset:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
  connection.close()
  assert served.left.wait(1)


def test_a_client_that_does_not_read_its_response_is_cut_off(served):
  before = served.ended("response not read")
  with served.connect(receive_buffer=4_096) as connection:
    connection.sendall(_POST.replace(b"/", b"/large", 1))
    wait_for(lambda: served.ended("response not read") == before + 1, 10)
    assert len(_all(connection)) < _LARGE
  with served.connect() as connection:  # One that reads gets everything, and its connection can be used again.
    connection.sendall(_POST.replace(b"/", b"/large", 1) + _POST)
    assert (_status(connection), _status(connection)) == (200, 200)


def test_a_body_that_is_not_ended_after_its_response_ends_the_connection():
  with _serving() as served:

    async def early(scope, receive, send):
      await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
      await send({"type": "http.response.body"})

    wait_for(lambda: served.server.started)  # It loads the app first.
    served.server.config.loaded_app = early
    with served.connect() as connection:
      connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
      assert _status(connection) == 401
      started = time.monotonic()
      with contextlib.suppress(ConnectionError):
        while time.monotonic() - started < 8:
          connection.sendall(b"1\r\nx\r\n")
          time.sleep(0.05)
      assert time.monotonic() - started < 5
    assert served.ended("body not ended") == 1


def test_a_flood_of_requests_on_one_connection_is_answered_up_to_a_limit(served):
  with served.connect() as connection:
    connection.sendall(_POST * 200)
    reply = _all(connection)
  assert reply.count(b"HTTP/1.1 200 OK") == 5  # One, and four that wait for it.
  assert served.ended("too many at once") == 1
  with served.connect() as connection:
    connection.sendall(_POST * 5)
    assert [_status(connection) for _ in range(5)] == [200] * 5


def test_idle_connections_make_room_and_busy_ones_do_not():
  limits = Limits(connections=6, client_connections=4, idle_seconds=30, body_seconds=30)
  with _serving(limits) as served, contextlib.ExitStack() as stack:
    connect = lambda address: stack.enter_context(served.connect(address))
    silent = [connect("127.0.0.1") for _ in range(4)]
    assert _works(served)
    fifth = connect("127.0.0.1")
    fifth.sendall(_GET)
    assert _status(fifth) == 200
    assert _all(silent[0]) == b"" and served.ended("evicted") == 1  # The one that had waited longest.
    for connection in (*silent[1:], fifth):
      connection.sendall(_POST[:-1])
    wait_for(lambda: not served.connections._idle)
    assert _all(connect("127.0.0.1")).startswith(b"HTTP/1.1 503 ")
    others = [connect("127.0.0.2"), connect("127.0.0.2")]  # Other clients still have a place.
    for connection in others:
      connection.sendall(_POST)
      assert _status(connection) == 200
    assert served.open() == 6
    assert _works(served) and served.ended("evicted") == 2
    for connection in others[1:]:
      connection.sendall(_POST[:-1])
    last = connect("127.0.0.3")
    last.sendall(_POST[:-1])
    wait_for(lambda: not served.connections._idle)
    assert _all(connect("127.0.0.4")).startswith(b"HTTP/1.1 503 ")
    for connection in (*silent[1:], fifth):
      connection.sendall(b"c")
      assert _status(connection) == 200
  assert served.open() == 0


def test_connections_of_a_proxy_are_those_of_many_clients():
  with _serving(Limits(client_connections=2), ["127.0.0.0/30"]) as served, contextlib.ExitStack() as stack:
    for _ in range(5):
      stack.enter_context(served.connect("127.0.0.1"))
    for _ in range(3):
      stack.enter_context(served.connect("127.0.0.8"))
    wait_for(lambda: served.ended("evicted") == 1)
    assert served.open() == 7
  with pytest.raises(InputError, match="--proxies=shop.example: must be an address or a network"):
    Connections(Limits(), Metrics(), ["shop.example"])
