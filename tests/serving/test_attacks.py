"""A server under attack answers every good request, and its work for each client is bounded and ends when it leaves."""

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import io
import json
import re
import socket
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
import pytest

from benchmarks.serve_attack import NUMBERS, blank_png, progressive_jpeg, run
from tests.helpers.http_server import LIMITS, Reply, call, labels_of, metric, png, predict, running, wait_for
from tests.helpers.miniature_runs import ROOT
from vixml_jax.images import tower
from vixml_jax.images.decoding import MAX_SCANS
from vixml_jax.inference.predictor import Predictor
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.serving import page_files
from vixml_jax.serving.access import Access
from vixml_jax.serving.gate import OPEN_PATHS

# Two images of 1,024 x 1,024 pixels are allowed, and half a megabyte of the bodies of a client.
_LIMITS = dataclasses.replace(
  LIMITS,
  batch=2,
  pixels=2**21,
  bodies_bytes=2_000_000,
  idle_seconds=2,
  head_seconds=2,
  body_seconds=3,
  response_seconds=2,
)
_NUMBERS = dict.fromkeys(NUMBERS, (8, 8)) | {"silent connections": (40, 40), "floods of requests": (2, 1)}
_opened: list[http.client.HTTPConnection] = []


@pytest.fixture(autouse=True)
def closed():
  """Closes the connections of a test."""
  yield
  while _opened:
    _opened.pop().close()


@pytest.fixture(scope="module")
def attacked(predictor):
  """Running server with small limits."""
  with running(lambda: predictor, _LIMITS) as server:
    yield server


def _address(server):
  return urlsplit(server.url).hostname, urlsplit(server.url).port


def test_every_good_request_is_answered_while_others_attack(attacked, capsys):
  right = asyncio.run(run(_address(attacked), 300, _NUMBERS, clients=8, hung=120, seconds=300))
  said = capsys.readouterr()
  assert right, said.out + said.err
  rows = [line.split(" | ") for line in said.out.splitlines() if line.startswith("| ")]
  counts = {row[0][2:]: row[1:] for row in rows}
  assert set(counts) == {"kind", "good requests", "malformed requests", *NUMBERS}
  assert int(counts["good requests"][1]) + int(counts["malformed requests"][2]) == 300


def test_an_attack_that_is_answered_wrongly_fails_the_campaign(attacked, monkeypatch, capsys):
  monkeypatch.setattr(LabelIndex, "uids", lambda self, ids: [f"wrong/{time.monotonic()}" for _ in ids])
  assert not asyncio.run(run(_address(attacked), 20, {}, clients=2, hung=60, seconds=120))
  assert "another answer than alone" in capsys.readouterr().err


@pytest.mark.slow
def test_10_000_requests_of_which_a_fifth_is_malformed_under_all_attacks(predictor, capsys):
  with running(lambda: predictor, dataclasses.replace(LIMITS, queries=64, idle_seconds=5)) as server:
    right = asyncio.run(run(_address(server), 10_000, NUMBERS, hung=60, seconds=900))
  assert right, capsys.readouterr()


def _begin(server, sent, announced, address="127.0.0.1"):
  """Begins a request with a body, and returns its connection."""
  connection = http.client.HTTPConnection(*_address(server), timeout=30, source_address=(address, 0))
  _opened.append(connection)
  connection.putrequest("POST", "/v1/predict")
  connection.putheader("Content-Type", "application/json")
  connection.putheader("Content-Length", str(announced))
  connection.endheaders(sent)
  return connection


def test_announced_bytes_take_no_room(attacked):
  with contextlib.ExitStack() as stack:
    for _ in range(34):
      stack.callback(_begin(attacked, b"{", 190_000).close)
    for _ in range(3):
      assert labels_of(predict(attacked, {"title": "sun"}))


def test_bytes_are_limited_for_each_client_and_in_all(attacked):
  part, query = b" " * 150_000, json.dumps({"queries": [{"title": "sun"}]}).encode()
  with contextlib.ExitStack() as stack:

    def begin(address):
      connection = _begin(attacked, part, 160_000, address)
      stack.callback(connection.close)
      time.sleep(0.05)
      return connection

    first, _, _ = (begin("127.0.0.2") for _ in range(3))
    reply = Reply(begin("127.0.0.2").getresponse())  # One client may have 500,000 bytes.
    assert reply.status == 503 and "too many requests" in reply.json["error"]["message"]
    others = [begin(f"127.0.0.{last}") for last in range(10, 20)]
    assert Reply(begin("127.0.0.20").getresponse()).status == 503  # All may have 2,000,000.
    assert call(attacked, "/healthz").status == 200
    for connection in (first, others[0]):
      connection.send(query + b" " * (10_000 - len(query)))
      assert labels_of(Reply(connection.getresponse()))
    again = begin("127.0.0.2")  # The room is free again.
    again.send(query + b" " * (10_000 - len(query)))
    assert labels_of(Reply(again.getresponse()))


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/embeddings"])
def test_a_connection_whose_body_was_refused_after_it_had_arrived_answers_the_next_request(attacked, path):
  connection = http.client.HTTPConnection(*_address(attacked), timeout=30)
  _opened.append(connection)
  for body, statuses in ((b"[" + b"0," * 2_001 + b"0]", [413]), (b"{}", [400, 422])):
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    socket_of_both, reply = connection.sock, Reply(connection.getresponse())
    assert reply.status in statuses and connection.sock is socket_of_both


class _Decoded:
  """Counts the images that are decoded, and holds the decoders back while `go` is not set."""

  def __init__(self, monkeypatch):
    self.sizes, self.go, self._decode = [], threading.Event(), tower.decode
    self.go.set()
    monkeypatch.setattr(tower, "decode", self)

  def __call__(self, blob):
    pixels = self._decode(blob)
    self.sizes.append(pixels.shape[:2])
    self.go.wait(30)
    return pixels


def test_images_beyond_those_of_the_model_are_not_looked_at_and_none_is_decoded_twice(attacked, monkeypatch):
  decoded = _Decoded(monkeypatch)
  images = [base64.b64encode(png(size, size)).decode() for size in (16, 24)]
  query = {"title": "sun", "images": images}
  found = labels_of(predict(attacked, query))
  assert sorted(decoded.sizes) == [(16, 16), (24, 24)]
  for third in ("no base64!", blank_png(9_000), images[0]):  # The model reads two.
    assert labels_of(predict(attacked, query | {"images": [*images, third]})) == found
  assert len(decoded.sizes) == 8


@pytest.mark.parametrize(
  "images,field,message",
  [
    ([blank_png(9_000)], "images[0]", "more than 67,108,864 pixels"),
    ([blank_png(1_024), blank_png(1_025)], "images[1]", "too many pixels; send fewer or smaller ones"),
    ([blank_png(8), progressive_jpeg(MAX_SCANS, 64)], "images[1]", "more than 100 scans"),
  ],
)
def test_sizes_of_images_are_checked_before_any_is_decoded(attacked, monkeypatch, images, field, message):
  decoded = _Decoded(monkeypatch)
  reply = predict(attacked, {"title": "sun", "images": images})
  assert reply.status == 422 and reply.json["error"]["field"] == f"queries[0].{field}"
  assert message in reply.json["error"]["message"] and not decoded.sizes
  assert labels_of(predict(attacked, {"title": "sun", "images": [blank_png(1_024)] * 2}))
  assert len(decoded.sizes) == 2


def _ask(server, query, address):
  """Sends a query and returns the connection."""
  body = json.dumps({"queries": [query]}).encode()
  return _begin(server, body, len(body), address)


def _left(server):
  """Number of requests whose client left before the answer."""
  text = call(server, "/metrics").body.decode()
  return sum(map(float, re.findall(r'vixml_requests_total\{route="/v1/predict",status="499"\} (\S+)', text)))


def test_images_of_one_client_wait_for_its_others_and_those_of_other_clients_do_not(attacked, monkeypatch):
  decoded = _Decoded(monkeypatch)
  decoded.go.clear()
  asked = [
    _ask(attacked, {"title": "sun", "images": [blank_png(side)] * 2}, address)
    for side, address in ((1_024, "127.0.0.2"), (1_023, "127.0.0.2"), (1_022, "127.0.0.3"))
    if not time.sleep(0.2)
  ]
  wait_for(lambda: len(decoded.sizes) == 2)
  time.sleep(0.2)
  assert sorted(decoded.sizes) == [(1_022, 1_022), (1_024, 1_024)]
  decoded.go.set()
  for connection in asked:
    assert labels_of(Reply(connection.getresponse()))
    connection.close()
  assert len(decoded.sizes) == 6


def test_when_a_client_leaves_its_images_are_no_longer_decoded_and_its_pixels_are_free_again(attacked, monkeypatch):
  decoded = _Decoded(monkeypatch)
  decoded.go.clear()
  leaving = _ask(attacked, {"title": "sun", "images": [blank_png(1_024)] * 2}, "127.0.0.2")
  wait_for(lambda: decoded.sizes)
  before = _left(attacked)
  leaving.close()
  wait_for(lambda: _left(attacked) == before + 1)
  staying = _ask(attacked, {"title": "sun", "images": [blank_png(1_000)] * 2}, "127.0.0.2")
  time.sleep(0.3)
  assert decoded.sizes == [(1_024, 1_024)]  # The thread still has the image of the one who left.
  decoded.go.set()
  assert labels_of(Reply(staying.getresponse()))
  staying.close()
  assert decoded.sizes == [(1_024, 1_024), (1_000, 1_000), (1_000, 1_000)]


class _Encoded:
  """Records the texts that are encoded, and holds the engine back while `go` is not set."""

  def __init__(self, monkeypatch):
    self.texts, self.go, encode = [], threading.Event(), Predictor.encode

    def recorded(predictor, queries, **options):
      self.texts += [query.text for query in queries]
      self.go.wait(30)
      return encode(predictor, queries, **options)

    monkeypatch.setattr(Predictor, "encode", recorded)


@pytest.mark.parametrize("reset", [False, True])
def test_queued_queries_of_a_client_that_has_left_are_dropped(attacked, monkeypatch, reset):
  encoded = _Encoded(monkeypatch)
  first = _ask(attacked, {"title": "first"}, "127.0.0.2")
  wait_for(lambda: encoded.texts)
  leaving = _ask(attacked, {"title": "leaving"}, "127.0.0.3")
  staying = _ask(attacked, {"title": "staying"}, "127.0.0.4")
  staying.sock.shutdown(socket.SHUT_WR)  # It has only closed its side.
  wait_for(lambda: metric(attacked, "vixml_queue_queries") == 2)
  before = _left(attacked)
  if reset:
    leaving.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
  leaving.close()
  wait_for(lambda: _left(attacked) == before + 1)
  time.sleep(0.5)
  encoded.go.set()
  assert labels_of(Reply(first.getresponse())) and labels_of(Reply(staying.getresponse()))
  assert [text.strip() for text in encoded.texts] == ["first", "staying"]


def test_a_request_that_takes_too_long_is_given_up(predictor, monkeypatch):
  encoded = _Encoded(monkeypatch)
  encoded.go.set()
  with running(lambda: predictor, dataclasses.replace(_LIMITS, answer_seconds=0.5)) as server:
    encoded.go.clear()
    busy = _ask(server, {"title": "first"}, "127.0.0.2")
    wait_for(lambda: encoded.texts)
    reply = predict(server, {"title": "second"})
    assert reply.status == 503 and reply.headers["Retry-After"] == "1"
    assert "the answer takes more than 0.5 s" in reply.json["error"]["message"]
    encoded.go.set()
    assert Reply(busy.getresponse()).status == 503
    assert "second" not in "".join(encoded.texts)


def test_queries_of_one_client_leave_room_in_the_queue(predictor, monkeypatch):
  encoded = _Encoded(monkeypatch)
  encoded.go.set()
  with running(lambda: predictor, dataclasses.replace(_LIMITS, queries=2, queue=8, batch=2)) as server:
    encoded.go.clear()
    encoded.texts.clear()
    asked = [_ask(server, {"title": "one"}, "127.0.0.2")]
    wait_for(lambda: encoded.texts)  # Otherwise the first batch may have two queries.
    asked += [_ask(server, {"title": f"one {i}"}, "127.0.0.2") for i in range(3)]
    wait_for(lambda: metric(server, "vixml_queue_queries") == 3)
    fifth = _ask(server, {"title": "five"}, "127.0.0.2")
    assert Reply(fifth.getresponse()).status == 503
    asked.append(_ask(server, {"title": "another client"}, "127.0.0.3"))
    wait_for(lambda: metric(server, "vixml_queue_queries") == 4)
    encoded.go.set()
    assert all(labels_of(Reply(connection.getresponse())) for connection in asked)


_FILES = ("open", "os.", "shutil.", "tempfile.", "glob.", "mmap.", "sqlite3.", "import", "ctypes.dlopen")
_CONNECTIONS = ("socket.connect", "socket.bind", "socket.get", "socket.send", "http.", "urllib.", "ftplib.", "smtplib.")
_PROCESSES = ("subprocess.", "pty.", "exec", "pickle.")
_watched: list[tuple[str, str]] | None = None


def _audit(event, arguments):
  watched = _watched is not None and threading.current_thread() is not threading.main_thread()  # That sends requests.
  if watched and event.startswith(_FILES + _CONNECTIONS + _PROCESSES):
    _watched.append((event, repr(arguments)[:200]))


def test_no_request_reads_a_file_or_opens_a_connection(attacked, with_images):
  global _watched
  sys.addaudithook(_audit)  # It cannot be removed.
  rng, encoded = np.random.default_rng(0), []
  for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, format)
    encoded.append(base64.b64encode(buffer.getvalue()).decode())
  places = ["file:///etc/passwd", "http://127.0.0.1:9/x.png", "/etc/passwd", "data:image/png,/etc/passwd", "AAAA"]
  paths = ["/", "/page.js", "/healthz", "/readyz", "/openapi.json", "/v1/models", "/v1/suggestions", "/../etc/passwd"]
  paths += ["/v1/labels/label/3", "/v1/labels/..%2f..%2fetc%2fpasswd", "/v1/models/x", "/%2e%2e/etc/passwd", "/nothing"]
  model = call(attacked, "/v1/models").json["data"][0]["id"]
  _watched = []
  try:
    statuses = [call(attacked, path).status for path in paths]
    for ranking in ("plain", "retrieval_augmented"):
      for others in ({}, {"deny": ["label/1"]}, {"allow": ["label/1", "label/2"]}, {"explain": True}):
        labels_of(predict(attacked, {"title": "sun rain"}, {"title": "x" * 200}, ranking=ranking, **others))
    for image in encoded:
      labels_of(predict(attacked, {"title": "sun", "images": [image]}))
    for place in places:
      assert predict(attacked, {"title": "sun", "images": [place]}).status == 422
    assert call(attacked, "/v1/embeddings", json.dumps({"model": model, "input": "sun"})).status == 200
    for body in (b"{", b"\xff", json.dumps({"queries": []}), json.dumps({"queries": [{"title": "a"}], "top": 1})):
      assert call(attacked, "/v1/predict", body).status in (400, 422)
    assert call(attacked, "/healthz", Host="evil.example").status == 421
    found, _watched = _watched, []
    assert found == []
    assert call(attacked, "/metrics").status == 200  # The only one: its numbers of the process are from /proc.
    assert _watched and all("'/proc/" in arguments for _, arguments in _watched)
  finally:
    _watched = None
  assert set(statuses) == {200, 404}


def test_texts_of_labels_are_sent_as_json_only(attacked, monkeypatch):
  markup = "<script>alert(1)</script>"
  monkeypatch.setattr(LabelIndex, "texts", lambda self, ids: [markup] * len(ids))
  for reply in (predict(attacked, {"title": markup}), call(attacked, "/v1/labels/label/3")):
    assert reply.status == 200 and markup in reply.body.decode()
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
  for path in (f"/{markup}", f"/v1/labels/{markup}", f"/v1/models/{markup}"):
    reply = call(attacked, path.replace("<", "%3C").replace(">", "%3E"))
    assert reply.status == 404 and reply.headers["Content-Type"] == "application/json"


def test_the_script_of_the_page_makes_no_markup_of_texts():
  folder = ROOT / "vixml_jax" / "serving" / "page"
  script = (folder / "page.js").read_text("utf-8")
  assert not re.findall(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser", script
  )
  assert "textContent" in script
  page = (folder / "page.html").read_text("utf-8")
  assert not re.findall(r"<script(?! src=)|\son\w+=|style=|javascript:", page)


def test_without_a_key_only_the_page_and_the_probes_are_open(predictor):
  with running(lambda: predictor, access=Access.of("127.0.0.1", keys=["secret"]), ready=False) as server:
    wait_for(lambda: call(server, "/readyz").status == 200)
    described = call(server, "/openapi.json", Authorization="Bearer secret").json["paths"]
    paths = {re.sub(r"{\w+}", "x", path): next(iter(methods)).upper() for path, methods in described.items()}
    paths |= dict.fromkeys(
      [*page_files._FILES, "/openapi.json", "/nothing", "//healthz", "/healthz/", "/HEALTHZ"], "GET"
    )
    bodies = {path: "{}" if method == "POST" else None for path, method in paths.items()}
    open_paths = {path for path, method in paths.items() if call(server, path, bodies[path], method).status != 401}
    assert open_paths == OPEN_PATHS == {"/", "/page.css", "/page.js", "/healthz", "/readyz"}
    # What a stranger learns about the model from the probes.
    assert not {"workdir", "key", "config"} & set(call(server, "/healthz").json)
