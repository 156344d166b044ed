"""Measures throughput and latency of a server on this machine while some of the requests are invalid.

  .venv/bin/python -m benchmarks.serve_load --url=http://127.0.0.1:8080 --clients=1,8,32 --seconds=5 \
      [--bad=0.1] [--images=0.1]

Each client sends one query at a time on a persistent connection and waits for the answer. One thread serves all
clients, so that little of the machine is taken from the server. Titles are random words. A share of the queries has an
image of noise. A share of the requests is invalid in one of several ways and must get a status of 4xx. The script
prints one line for each number of clients.

Several servers, separated by commas in `--url`, are loaded in turns, `--rounds` times, and get lines of their own with
the medians of the rounds. The last column divides the good requests per second by those of the first server.
"""

import argparse
import base64
import io
import ipaddress
import json
import selectors
import socket
import time
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

WORDS = ["arrow", "cloud", "sun", "rain", "user", "file", "lock", "open", "star", "heart", "book", "map", "home"]
_LONGEST_SECONDS = 60
_MOST_CLIENTS = 256


def noise(rng: np.random.Generator, size: int) -> str:
  """Returns a square PNG of noise in base64."""
  buffer = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def bad_bodies() -> list[bytes]:
  """Returns invalid request bodies; each must get a status of 4xx."""
  query = {"title": "cloud"}
  broken = base64.b64encode(b"\x89PNG\r\n\x1a\n and no more").decode()
  bodies = [
    {},
    [],
    {"queries": []},
    {"queries": "cloud"},
    {"queries": [query], "k": 10**6},
    {"queries": [query], "top": 1},
    {"queries": [{"title": 3}]},
    {"queries": [query | {"images": [broken]}]},
    {"queries": [query] * 10_000},
    {"queries": [query | {"deny": ["no such label"]}]},
  ]
  return [b"{", b"\xff", b"[" * 100_000, *(json.dumps(body).encode() for body in bodies)]


class Client:
  """One connection that sends a request, waits for the answer, and sends the next one."""

  def __init__(self, address: tuple[str, int], seed: int, bad_share: float, image_share: float):
    self._rng, self._bad = np.random.default_rng(seed), bad_bodies()
    self._bad_share, self._image_share = bad_share, image_share
    self._images = [noise(self._rng, 64) for _ in range(4)] if image_share else []
    self._host = f"{address[0]}:{address[1]}"
    self.socket = socket.create_connection(address, timeout=60)
    self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self.taken: list[tuple[bool, float]] = []
    self._good, self._started, self._received = True, 0.0, b""
    self._request = self._next_request()

  def send(self) -> None:
    """Sends a request."""
    self._good, message = self._request
    self._received, self._started = b"", time.perf_counter()
    self.socket.sendall(message)
    self._request = self._next_request()  # Prepared while the server works.

  def receive(self) -> bool:
    """Reads what has arrived; returns whether the response is complete, and records whether it is right."""
    part = self.socket.recv(2**16)
    if not part:
      raise SystemExit("the server closed a connection; see its log")
    self._received += part
    head, separator, body = self._received.partition(b"\r\n\r\n")
    if not separator or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r", 1)[0]):
      return False
    self.taken.append((self._good, time.perf_counter() - self._started))
    status = int(head.split(b" ", 2)[1])
    if (status == 200) != self._good or status >= 500:
      raise SystemExit(f"status {status} for a {'good' if self._good else 'bad'} request: {body[:200]!r}")
    return True

  def _next_request(self) -> tuple[bool, bytes]:
    """Returns whether the next request is valid, and its bytes."""
    rng, good = self._rng, bool(self._rng.random() >= self._bad_share)
    query = {"title": " ".join(rng.choice(WORDS, rng.integers(1, 6)))}
    if self._images and rng.random() < self._image_share:
      query["images"] = [self._images[rng.integers(len(self._images))]]
    body = json.dumps({"queries": [query], "k": 10}).encode() if good else self._bad[rng.integers(len(self._bad))]
    head = f"POST /v1/predict HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
    return good, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def load(address: tuple[str, int], number: int, seconds: float, bad: float, images: float) -> list[tuple[bool, float]]:
  """Loads a server for some seconds; returns for each request whether it was valid, and its seconds."""
  clients = [Client(address, seed, bad, images) for seed in range(number)]
  with selectors.DefaultSelector() as selector:
    until = time.perf_counter() + seconds
    for client in clients:
      selector.register(client.socket, selectors.EVENT_READ, client)
      client.send()
    waiting = number
    while waiting:
      for key, _ in selector.select():
        if key.data.receive():
          if time.perf_counter() < until:
            key.data.send()
          else:
            waiting -= 1
            key.data.socket.close()
            selector.unregister(key.data.socket)
  return [each for client in clients for each in client.taken]


def _measured(taken: list[tuple[bool, float]], seconds: float) -> list[float]:
  """Returns requests per second, p50 and p99 in milliseconds of the valid requests, and of the invalid ones."""
  numbers = []
  for wanted in (True, False):
    times = 1000 * np.array([spent for good, spent in taken if good == wanted])
    numbers += [len(times) / seconds, *(np.percentile(times, share) if len(times) else np.nan for share in (50, 99))]
  return numbers


def local_address(parser: argparse.ArgumentParser, url: str) -> tuple[str, int]:
  """Returns host and port of a URL, and ends the script if they are not those of this machine."""
  parts = urlsplit(url)
  if parts.hostname != "localhost" and not ipaddress.ip_address(parts.hostname or "").is_loopback:
    parser.error("--url must be on this machine: 127.0.0.1 or localhost")
  return parts.hostname or "", parts.port or 80


def main() -> None:
  """Loads the servers with each number of clients and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--url", default="http://127.0.0.1:8080", help="servers, separated by commas")
  parser.add_argument("--clients", default="1,8,32")
  parser.add_argument("--seconds", type=float, default=5, help="of each round")
  parser.add_argument("--rounds", type=int, default=1, help="how often each server is loaded, in turns")
  parser.add_argument("--bad", type=float, default=0.1, help="share of requests that are invalid")
  parser.add_argument("--images", type=float, default=0.0, help="share of queries with an image")
  arguments = parser.parse_args()
  urls = arguments.url.split(",")
  addresses = [local_address(parser, url) for url in urls]
  numbers = [min(int(number), _MOST_CLIENTS) for number in arguments.clients.split(",")]
  seconds = min(arguments.seconds, _LONGEST_SECONDS)
  print("| server | clients | good requests/s | p50 ms | p99 ms | bad requests/s | p50 ms | p99 ms | ratio |")
  print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
  for number in numbers:
    rounds = [
      [_measured(load(address, number, seconds, arguments.bad, arguments.images), seconds) for address in addresses]
      for _ in range(arguments.rounds)
    ]
    median = np.median(rounds, axis=0)  # [servers, 6]
    for url, measured in zip(urls, median, strict=True):
      cells = [f"{value:,.0f}" if i % 3 == 0 else f"{value:.1f}" for i, value in enumerate(measured)]
      ratio = measured[0] / median[0][0]
      print(f"| {url} | {number} | {' | '.join(cells)} | {ratio:.2f} |".replace("nan", ""), flush=True)


if __name__ == "__main__":
  main()
