"""Attacks a server on this machine in many ways at once, and checks that it answers every good request meanwhile.

  .venv/bin/python -m benchmarks.serve_attack --url=http://127.0.0.1:8080 --requests=10000 [--bad=0.2] [--seconds=600]

Start the server with short limits, so that the attacks end soon: `--idle_seconds=5 --max_queue=4096`. First, some
queries are asked alone. Then `--clients` clients send `--requests` requests, of which a share is malformed, and every
answer is compared with that of the query alone. At the same time, other connections are silent, send or read slowly,
close one side, leave before the answer, send oversized heads and floods of requests, ask for files, and name files and
addresses as images. The script prints one line for each kind, and the server's resident memory at the start, in the
middle and at the end. Its status is 1 if an answer was wrong or a connection hung.

A request is refused rightly if it gets a status of 4xx, or 503 where the kind is one that overloads the server, or if
the server closes the connection. Nothing but loopback addresses is accepted, and everything ends after `--seconds`.
"""

import argparse
import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterator
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import socket
import sys
import time
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.serve_load import WORDS, bad_bodies, local_address, noise

_LONGEST_SECONDS = 3_600
_MOST_REQUESTS = 1_000_000
_WARM_UP = 1_000  # Requests before memory counts: allocators and caches grow until then.
_MARKUP = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{7*7}}", "\u202e<b>\u0000</b>"]


class Reply(NamedTuple):
  """A response."""

  status: int
  head: bytes
  body: bytes


@dataclasses.dataclass
class Tally:
  """What became of the requests of a kind."""

  sent: int = 0
  answered: int = 0
  refused: int = 0
  wrong: int = 0
  hung: int = 0
  examples: list[str] = dataclasses.field(default_factory=list)


class Wrong(Exception):
  """A request got another response than it should."""


class Connection:
  """A connection that sends what it is told to, and reads responses."""

  def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
    self.reader, self.writer = reader, writer

  async def ask(self, message: bytes) -> Reply | None:
    """Sends a request and returns the response; None if the server closes the connection instead."""
    try:
      self.writer.write(message)
      await self.writer.drain()
    except ConnectionError:
      pass  # The response may have arrived nevertheless.
    return await self.read()

  async def read(self) -> Reply | None:
    """Returns the next response; None if the server closes the connection instead."""
    try:
      head = b"HTTP/1.1 100 "
      while head.startswith(b"HTTP/1.1 100 "):
        head = await self.reader.readuntil(b"\r\n\r\n")
      fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
      if fields.get(b"transfer-encoding") == b"chunked":
        body = b"".join([part async for part in self._chunks()])
      else:
        body = await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
      return Reply(int(head.split(b" ", 2)[1]), head, body)
    except (asyncio.IncompleteReadError, ConnectionError):
      return None

  async def _chunks(self) -> Any:
    while size := int(await self.reader.readline(), 16):
      yield await self.reader.readexactly(size)
      await self.reader.readline()
    await self.reader.readline()

  async def closed(self) -> None:
    """Returns when the server has closed the connection."""
    with contextlib.suppress(ConnectionError):
      while await self.reader.read(2**16):
        pass


class Campaign:
  """Attacks on one server, and what became of them."""

  def __init__(self, address: tuple[str, int], seed: int = 0):
    self.address, self.host = address, f"{address[0]}:{address[1]}"
    self.tallies: dict[str, Tally] = {}
    self._rng = np.random.default_rng(seed)
    self.good: list[tuple[bytes, list[Any]]] = []
    self.pictures = False

  @contextlib.asynccontextmanager
  async def connection(self, receive_buffer: int | None = None) -> Any:
    """Yields a new connection, and closes it."""
    opened = socket.socket(socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET)
    opened.setblocking(False)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if receive_buffer:
      opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(opened, self.address)
    connection = Connection(*await asyncio.open_connection(sock=opened))
    try:
      yield connection
    finally:
      connection.writer.transport.abort()

  def head(self, path: str = "/v1/predict", length: int | None = None, method: str = "POST", **fields: str) -> bytes:
    """Returns the head of a request; `_` in the name of a field is a dash."""
    given = {"Host": self.host, "Content_Type": "application/json"} | fields
    if length is not None:
      given["Content_Length"] = str(length)
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode()

  def message(self, body: bytes, **fields: str) -> bytes:
    """Returns a request for labels."""
    return self.head(length=len(body), **fields) + body

  async def once(self, message: bytes) -> Reply | None:
    """Sends a request on a connection of its own."""
    async with self.connection() as connection:
      return await connection.ask(message)

  async def learn(self, number: int = 64) -> None:
    """Asks queries alone, so that their answers under attack can be compared."""
    health = await self.once(self.head("/healthz", method="GET"))
    if health is None or json.loads(health.body)["status"] != "ready":
      raise SystemExit("the server is not ready")
    self.pictures = bool(json.loads(health.body)["pictures"])
    for i in range(number):
      query: dict[str, Any] = {"title": " ".join(self._rng.choice(WORDS, self._rng.integers(1, 6)))}
      if i % 8 == 1:
        query["title"] += " " + _MARKUP[i // 8 % len(_MARKUP)]
      if i % 8 == 2 and self.pictures:
        query["images"] = [noise(self._rng, 64)]
      message = self.message(json.dumps({"queries": [query], "k": 10}).encode())
      reply = await self.once(message)
      if reply is None or reply.status != 200:
        raise SystemExit(f"a good request was not answered: {reply}")
      self.good.append((message, _predictions(reply)))

  def check_good(self, reply: Reply | None, wanted: list[Any]) -> str:
    """Returns `answered` if a response is the right one."""
    if reply is None or reply.status != 200:
      raise Wrong(f"a good request got {reply and (reply.status, reply.body[:200])}")
    if b"content-type: application/json" not in reply.head.lower():
      raise Wrong("an answer is not declared as JSON")
    found = _predictions(reply)
    same = [label for label, _ in found] == [label for label, _ in wanted]
    if not same or not np.allclose([score for _, score in found], [score for _, score in wanted], atol=1e-4):
      raise Wrong(f"another answer than alone: {found} and {wanted}")
    return "answered"

  async def good_request(self) -> str:
    """Sends a good request on a new connection."""
    message, wanted = self.good[self._rng.integers(len(self.good))]
    return self.check_good(await self.once(message), wanted)

  async def memory(self) -> float:
    """Returns the resident memory of the server in megabytes."""
    reply = await self.once(self.head("/metrics", method="GET"))
    if reply is None or reply.status != 200:
      raise SystemExit("/metrics cannot be read")
    (line,) = [line for line in reply.body.decode().splitlines() if line.startswith("process_resident_memory_bytes ")]
    return float(line.split()[1]) / 1e6

  async def counted(self, kind: str, attack: Callable[[], Awaitable[str]], seconds: float) -> bool:
    """Makes one attack, and counts what became of it; returns whether it was right."""
    tally = self.tallies.setdefault(kind, Tally())
    tally.sent += 1
    try:
      async with asyncio.timeout(seconds):
        outcome = await attack()
    except (TimeoutError, asyncio.CancelledError) as error:
      outcome = "hung"
      if isinstance(error, asyncio.CancelledError):  # The whole campaign takes too long.
        tally.hung += 1
        raise
    except Wrong as error:
      outcome = "wrong"
      tally.examples.append(str(error))
    except OSError as error:  # The server accepts no connection.
      outcome = "wrong"
      tally.examples.append(repr(error))
    setattr(tally, outcome, getattr(tally, outcome) + 1)
    return outcome in ("answered", "refused")


def _predictions(reply: Reply) -> list[Any]:
  return [(each["label"], each["score"]) for each in json.loads(reply.body)["answers"][0]["predictions"]]


def _refused(reply: Reply | None, *statuses: int) -> str:
  """Returns `refused` if the connection was closed, or the status is 4xx or one of `statuses`."""
  if reply is None or 400 <= reply.status < 500 or reply.status in statuses:
    return "refused"
  raise Wrong(f"status {reply.status}: {reply.body[:200]!r}")


def blank_png(side: int) -> str:
  """Returns a black square as PNG in base64, which is small for its number of pixels."""
  buffer = io.BytesIO()
  Image.new("1", (side, side)).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def progressive_jpeg(scans: int, side: int = 2_048) -> str:
  """Returns a progressive JPEG whose last scan is repeated, in base64: every scan passes over the whole image."""
  buffer = io.BytesIO()
  Image.new("L", (side, side)).save(buffer, "JPEG", progressive=True)
  blob = buffer.getvalue()
  last = blob[blob.rindex(b"\xff\xda") : -2]
  return base64.b64encode(blob[:-2] + last * scans + blob[-2:]).decode()


def attacks(campaign: Campaign) -> dict[str, Callable[[], Awaitable[str]]]:
  """Returns a function for each kind of attack; it makes one and returns `answered` or `refused`."""
  turn: Iterator[int] = itertools.count()
  a_query, one = {"title": "cloud"}, campaign.message(b'{"queries": [{"title": "cloud"}]}')

  async def silent() -> str:
    async with campaign.connection() as connection:
      await connection.closed()
    return "refused"

  async def dripped_head() -> str:
    async with campaign.connection() as connection:
      reading = asyncio.ensure_future(connection.read())
      for i in range(10_000):
        with contextlib.suppress(ConnectionError):
          connection.writer.write(one[i : i + 1] if i < 60 else b"x")
        done, _ = await asyncio.wait([reading], timeout=0.2)
        if done:
          break
      return _refused(reading.result())

  async def dripped_body() -> str:
    async with campaign.connection() as connection:
      connection.writer.write(campaign.head(length=100_000))
      reading = asyncio.ensure_future(connection.read())
      for _ in range(10_000):
        with contextlib.suppress(ConnectionError):
          connection.writer.write(b" ")
        done, _ = await asyncio.wait([reading], timeout=0.2)
        if done:
          break
      return _refused(reading.result(), 503)

  async def slow_reader() -> str:
    async with campaign.connection(receive_buffer=4_096) as connection:
      ask = campaign.head("/openapi.json", method="GET")
      for _ in range(10_000):  # Answers fill the buffers of both sides.
        connection.writer.write(ask * 4)
        await asyncio.sleep(0.05)
        if connection.writer.transport.is_closing():
          break
    return "refused"

  async def half_closed() -> str:
    message, wanted = campaign.good[next(turn) % len(campaign.good)]
    async with campaign.connection() as connection:
      connection.writer.write(message)
      connection.writer.write_eof()
      return campaign.check_good(await connection.read(), wanted)

  async def half_closed_in_head() -> str:
    async with campaign.connection() as connection:
      connection.writer.write(one[: next(turn) % len(one)])
      connection.writer.write_eof()
      return _refused(await connection.read())

  async def left() -> str:
    message, _ = campaign.good[next(turn) % len(campaign.good)]
    async with campaign.connection() as connection:
      connection.writer.write(message)
      await asyncio.sleep(0.001)
    return "refused"

  async def large_head() -> str:
    fields = [{"Cookie": "x" * 1_000_000}, {f"X-{i}": "y" * 100 for i in range(5_000)}, {"X_" + "n" * 300_000: "z"}]
    number = next(turn) % 4
    if number == 3:
      return _refused(await campaign.once(campaign.head("/" + "a" * 500_000, method="GET")))
    return _refused(await campaign.once(campaign.message(b"{}", **fields[number])))

  async def flood() -> str:
    async with campaign.connection() as connection:
      connection.writer.write(one * 5_000)
      with contextlib.suppress(ConnectionError):
        await connection.writer.drain()
      while (reply := await connection.read()) is not None:
        if reply.status not in (200, 503):
          raise Wrong(f"status {reply.status}")
    return "refused"

  async def broken_http() -> str:
    kinds = [
      b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,  # TLS.
      b"GET / HTTP/9.9\r\n\r\n",
      b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
      b"\x00" * 1_000,
      one.replace(b"Content-Length: ", b"Content-Length: -"),
      one.replace(b"Content-Length", b"Content-Length: 5\r\nContent-Length"),
      one.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length"),
      campaign.head(Transfer_Encoding="chunked") + b"ffffffffffffffffff\r\n",
      campaign.head(Transfer_Encoding="chunked, identity") + b"0\r\n\r\n",
      one.replace(b"Host: ", b"Host: a\r\nHost: "),
      one.replace(b"Host: ", b"Host : "),
      b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n",
    ]
    return _refused(await campaign.once(kinds[next(turn) % len(kinds)]))

  async def traversal() -> str:
    paths = [
      "/../../etc/passwd",
      "/%2e%2e/%2e%2e/etc/passwd",
      "/page/..%2f..%2fetc/passwd",
      "/..%5c..%5cwindows/win.ini",
    ]
    paths += [
      "/v1/labels/../../etc/passwd",
      "/v1/labels/%2fetc%2fpasswd",
      "//etc/passwd",
      "/page.css/../page.js%00.html",
    ]
    paths += ["/v1/models/../../../etc/passwd", "/%00", "/\\etc\\passwd", "http://127.0.0.1/etc/passwd"]
    reply = await campaign.once(campaign.head(paths[next(turn) % len(paths)], method="GET"))
    if reply is not None and b"root:" in reply.body:
      raise Wrong("a file was sent")
    return _refused(reply)

  async def named_images() -> str:
    places = ["file:///etc/passwd", "http://127.0.0.1:1/x.png", "https://example.com/x.png", "/etc/passwd", "ftp://a/b"]
    places += ["data:image/png,file:///etc/passwd", "data:image/svg+xml;base64,PHN2Zy8+", "\\\\host\\share\\x.png"]
    query = a_query | {"images": [places[next(turn) % len(places)]]}
    return _refused(await campaign.once(campaign.message(json.dumps({"queries": [query]}).encode())))

  costly = [[blank_png(9_000)], [blank_png(8_000)] * 8, [progressive_jpeg(5_000)]]

  async def costly_images() -> str:
    query = a_query | {"images": costly[next(turn) % len(costly)]}
    return _refused(await campaign.once(campaign.message(json.dumps({"queries": [query]}).encode())), 503)

  async def foreign() -> str:
    body = b'{"queries": [{"title": "cloud"}]}'
    fields = [{"Host": "evil.example"}, {"Content_Type": "text/plain"}, {"Content_Type": "multipart/form-data"}]
    fields += [{"Host": "127.0.0.1.evil.example"}, {"Host": ""}, {"Content_Type": "application/x-www-form-urlencoded"}]
    return _refused(await campaign.once(campaign.message(body, **fields[next(turn) % len(fields)])))

  return {
    "silent connections": silent,
    "heads dripped": dripped_head,
    "bodies dripped": dripped_body,
    "responses not read": slow_reader,
    "half-closed after a good request": half_closed,
    "half-closed in a request": half_closed_in_head,
    "clients that leave": left,
    "oversized heads": large_head,
    "floods of requests": flood,
    "broken HTTP": broken_http,
    "path traversal": traversal,
    "images named by file: and http:": named_images,
    "costly images": costly_images,
    "foreign hosts and content types": foreign,
  }


NUMBERS = {
  "silent connections": (200, 200),
  "heads dripped": (20, 20),
  "bodies dripped": (20, 20),
  "responses not read": (8, 8),
  "half-closed after a good request": (200, 2),
  "half-closed in a request": (200, 2),
  "clients that leave": (400, 4),
  "oversized heads": (100, 2),
  "floods of requests": (10, 1),
  "broken HTTP": (240, 2),
  "path traversal": (240, 2),
  "images named by file: and http:": (160, 2),
  "costly images": (9, 1),
  "foreign hosts and content types": (120, 2),
}
"""How often each attack is made, and how many of them at a time."""


async def _ask(
  campaign: Campaign, connection: Connection, message: bytes, wanted: list[Any] | None, reused: bool
) -> str:
  """Sends a request that must get an answer, or be refused if `wanted` is None."""
  reply = await connection.ask(message)
  if reply is None and reused:  # The server may close an idle connection at any time; a client then tries once more.
    reply = await campaign.once(message)
  return _refused(reply, 503) if wanted is None else campaign.check_good(reply, wanted)


async def load(
  campaign: Campaign, requests: int, clients: int, bad: float, seconds: float, memory: list[float]
) -> None:
  """Sends good and malformed requests on persistent connections; appends memory at the start, middle and end in MB."""
  rng, malformed = np.random.default_rng(1), [campaign.message(body) for body in bad_bodies()]
  left = iter(range(requests))

  async def client() -> None:
    async with contextlib.AsyncExitStack() as opened:
      connection = None
      for number in left:
        if number in (min(_WARM_UP, requests // 10), requests // 2):
          memory.append(await campaign.memory())
        good = bool(rng.random() >= bad)
        message, wanted = campaign.good[rng.integers(len(campaign.good))]
        if not good:
          message = malformed[rng.integers(len(malformed))]
        reused = connection is not None
        if connection is None:
          connection = await opened.enter_async_context(campaign.connection())

        ask = functools.partial(_ask, campaign, connection, message, wanted if good else None, reused)
        right = await campaign.counted("good requests" if good else "malformed requests", ask, seconds)
        if not right or connection.reader.at_eof() or not good:  # A refused request may close the connection.
          await opened.aclose()
          connection = None

  await asyncio.gather(*(client() for _ in range(clients)))
  memory.append(await campaign.memory())


async def attack(campaign: Campaign, kinds: dict[str, tuple[int, int]], seconds: float) -> None:
  """Makes attacks of some kinds at the same time.

  Args:
    campaign: The campaign.
    kinds: How often each attack is made, and how many of them at a time.
    seconds: How long an attack may take.
  """
  functions = attacks(campaign)

  async def repeat(kind: str, left: Iterator[int]) -> None:
    for _ in left:
      await campaign.counted(kind, functions[kind], seconds)

  await asyncio.gather(
    *(repeat(kind, left) for kind, (number, at_a_time) in kinds.items() for left in [iter(range(number))] * at_a_time)
  )


def report(campaign: Campaign) -> bool:
  """Prints a line for each kind, and examples of wrong responses; returns whether all were right."""
  print("| kind | sent | answered rightly | refused rightly | wrong | hung |\n|---|---:|---:|---:|---:|---:|")
  for kind, tally in campaign.tallies.items():
    values = (tally.sent, tally.answered, tally.refused, tally.wrong, tally.hung)
    print(f"| {kind} | {' | '.join(f'{value:,}' for value in values)} |")
  for kind, tally in campaign.tallies.items():
    for example in list(dict.fromkeys(tally.examples))[:3]:
      print(f"{kind}: {example}", file=sys.stderr)
  return not any(tally.wrong or tally.hung for tally in campaign.tallies.values())


async def run(
  address: tuple[str, int],
  requests: int,
  kinds: dict[str, tuple[int, int]],
  *,
  clients: int = 32,
  bad: float = 0.2,
  hung: float = 60,
  seconds: float = 600,
) -> bool:
  """Makes a whole campaign and prints its results.

  Args:
    address: Host and port of the server.
    requests: Number of good and malformed requests.
    kinds: As for `attack`.
    clients: Number of clients that send the requests.
    bad: Share of the requests that are malformed.
    hung: Seconds after which a request counts as hung.
    seconds: Seconds after which the campaign is given up.

  Returns:
    Whether every response was right and nothing hung.
  """
  campaign = Campaign(address)
  await campaign.learn()
  memory: list[float] = []
  started = time.perf_counter()
  attacking = asyncio.ensure_future(attack(campaign, kinds, hung))
  loading = asyncio.ensure_future(load(campaign, requests, clients, bad, hung, memory))
  loading.add_done_callback(lambda _: spent.append(time.perf_counter() - started))
  spent = list[float]()
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(seconds):
      await asyncio.gather(loading, attacking)
  await asyncio.sleep(0.1)
  right = report(campaign)
  total = sum(campaign.tallies[kind].sent for kind in ("good requests", "malformed requests"))
  print(f"{total / spent[0]:,.0f} requests/s for {spent[0]:.0f} s")
  print("memory in MB at the start, in the middle, at the end: " + ", ".join(f"{value:,.0f}" for value in memory))
  return right


def main() -> None:
  """Attacks a server and prints what became of the requests."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--url", default="http://127.0.0.1:8080")
  parser.add_argument("--requests", type=int, default=10_000, help="good and malformed requests of the clients")
  parser.add_argument("--clients", type=int, default=32)
  parser.add_argument("--bad", type=float, default=0.2, help="share of the requests that are malformed")
  parser.add_argument("--kinds", default=",".join(NUMBERS), help="attacks beside the requests, separated by commas")
  parser.add_argument("--hung", type=float, default=60, help="seconds after which a request counts as hung")
  parser.add_argument("--seconds", type=float, default=600, help="after which the campaign is given up")
  arguments = parser.parse_args()
  kinds = {kind: NUMBERS[kind] for kind in arguments.kinds.split(",") if kind}

  right = asyncio.run(
    run(
      local_address(parser, arguments.url),
      min(arguments.requests, _MOST_REQUESTS),
      kinds,
      clients=arguments.clients,
      bad=arguments.bad,
      hung=arguments.hung,
      seconds=min(arguments.seconds, _LONGEST_SECONDS),
    )
  )
  sys.exit(0 if right else 1)


if __name__ == "__main__":
  main()
