"""Measures throughput and latency of a server on this machine while some of the requests are invalid.

  .venv/bin/python -m benchmarks.serve_load --url=http://127.0.0.1:8080 --clients=1,8,32 --seconds=5 \
      [--bad=0.1] [--images=0.1]

Each client sends one query at a time on a persistent connection and waits for the answer. Titles are random words. A
share of the queries has an image of noise. A share of the requests is invalid in one of several ways and must get a
status of 4xx. The script prints one line for each number of clients.
"""

import argparse
import base64
from concurrent.futures import ThreadPoolExecutor
import http.client
import io
import ipaddress
import json
import time
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

_WORDS = ["arrow", "cloud", "sun", "rain", "user", "file", "lock", "open", "star", "heart", "book", "map", "home"]
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


def client(address: str, seed: int, until: float, bad_share: float, image_share: float) -> list[tuple[bool, float]]:
  """Sends requests until a time; returns for each request whether it was valid, and its seconds."""
  rng, bad = np.random.default_rng(seed), bad_bodies()
  images = [noise(rng, 64) for _ in range(4)] if image_share else []
  connection = http.client.HTTPConnection(address, timeout=60)
  taken = []
  while time.perf_counter() < until:
    good = rng.random() >= bad_share
    query = {"title": " ".join(rng.choice(_WORDS, rng.integers(1, 6)))}
    if images and rng.random() < image_share:
      query["images"] = [images[rng.integers(len(images))]]
    body = json.dumps({"queries": [query], "k": 10}).encode() if good else bad[rng.integers(len(bad))]
    started = time.perf_counter()
    connection.request("POST", "/v1/predict", body)
    response = connection.getresponse()
    response.read()
    taken.append((good, time.perf_counter() - started))
    if (response.status == 200) != good or response.status >= 500:
      raise SystemExit(f"status {response.status} for {body[:100]!r}")
  connection.close()
  return taken


def main() -> None:
  """Loads the server with each number of clients and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--url", default="http://127.0.0.1:8080")
  parser.add_argument("--clients", default="1,8,32")
  parser.add_argument("--seconds", type=float, default=5)
  parser.add_argument("--bad", type=float, default=0.1, help="share of requests that are invalid")
  parser.add_argument("--images", type=float, default=0.0, help="share of queries with an image")
  arguments = parser.parse_args()
  url = urlsplit(arguments.url)
  if url.hostname != "localhost" and not ipaddress.ip_address(url.hostname or "").is_loopback:
    parser.error("--url must be on this machine: 127.0.0.1 or localhost")
  numbers = [min(int(number), _MOST_CLIENTS) for number in arguments.clients.split(",")]
  print("| clients | good requests/s | p50 ms | p99 ms | bad requests/s | p50 ms | p99 ms |")
  print("|---:|---:|---:|---:|---:|---:|---:|")
  for number in numbers:
    seconds = min(arguments.seconds, _LONGEST_SECONDS)
    until = time.perf_counter() + seconds
    with ThreadPoolExecutor(number) as pool:
      futures = [
        pool.submit(client, url.netloc, seed, until, arguments.bad, arguments.images) for seed in range(number)
      ]
      taken = [each for future in futures for each in future.result()]
    cells = [str(number)]
    for wanted in (True, False):
      times = 1000 * np.array([spent for good, spent in taken if good == wanted])
      cells += [
        f"{len(times) / seconds:,.0f}",
        *(f"{np.percentile(times, share):.1f}" if len(times) else "" for share in (50, 99)),
      ]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
