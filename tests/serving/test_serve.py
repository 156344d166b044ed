"""`serve` on loopback: the same answers as the API, batched, while bad requests, new indexes and signals come in."""

import base64
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import http.client
import io
import json
import os
from pathlib import Path
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import quote, urlsplit

import jax
import numpy as np
from PIL import Image
import pytest

from tests.helpers import trained_workdirs
from tests.helpers.miniature_runs import ROOT
import vixml_jax
from vixml_jax.errors import InputError
from vixml_jax.inference.predictor import Predictor
from vixml_jax.inference.queries import Query
from vixml_jax.search import filters as search_filters
from vixml_jax.search.label_index import Filters, IndexContents, LabelIndex, write_index
from vixml_jax.serving import engine as engine_module
from vixml_jax.serving import served_index
from vixml_jax.serving.batching import Batcher, QueueFull
from vixml_jax.serving.engine import Engine, QueryRequest
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.served_index import ServedIndex
from vixml_jax.serving.server import Server

LIMITS = Limits(
  body_bytes=200_000, body_values=2_000, queries=5, k=20, text_chars=200, images=3, names=6, batch=16, wait_seconds=0.02
)
_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def running(load, limits=LIMITS, ready=True):
  """A server in a thread; its end waits for what is in flight."""
  server = Server(load, limits=limits)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    if ready:
      wait_for(lambda: call(server, "/healthz").status == 200)
    yield server
  finally:
    server.stop()
    thread.join()


def wait_for(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


class Reply:
  """Status, headers and body of a response."""

  def __init__(self, response):
    self.status, self.headers, self.body = response.status, response.headers, response.read()

  @property
  def json(self):
    return json.loads(self.body)


def connect(server):
  return http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)


def call(server, path, body=None, method=None, **headers):
  """One request on a connection of its own."""
  connection = connect(server)
  try:
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    return Reply(connection.getresponse())
  finally:
    connection.close()


def predict(server, *queries, **others):
  return call(server, "/v1/predict", json.dumps({"queries": queries, **others}))


def labels_of(reply):
  assert reply.status == 200, reply.body
  return [
    [(found["label"], found["id"], found["text"]) for found in answer["predictions"]]
    for answer in reply.json["answers"]
  ]


def expected(predictor, queries, k):
  return [[tuple(found[:3]) for found in labels] for labels in predictor.predict(queries, k)]


def metric(server, name):
  """The sum of a metric's samples."""
  lines = call(server, "/metrics").body.decode().splitlines()
  return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(re.escape(name) + r"[ {]", line))


@contextlib.contextmanager
def counted_compilations():
  events = []
  listen = lambda event, *_, **__: events.append(event) if event == _COMPILED else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def illustrated(tmp_path_factory):
  return trained_workdirs.with_images(tmp_path_factory)


@pytest.fixture(scope="module")
def predictor(illustrated):
  return vixml_jax.load(illustrated.workdir)


@pytest.fixture(scope="module")
def server(predictor):
  with running(lambda: predictor) as server:
    yield server


def in_base64(query):
  """A query of the tests as JSON can hold it."""
  images = [base64.b64encode(image).decode() for image in query.get("images", [])]
  return {key: value for key, value in query.items() if key != "images"} | ({"images": images} if images else {})


def test_answers_are_those_of_the_api(illustrated, predictor, server):
  queries = illustrated.queries[:4]
  given = [in_base64(query) for query in queries]
  assert any("images" in query for query in given) and any("deny" in query for query in given)
  reply = predict(server, *given, k=7)
  assert labels_of(reply) == expected(predictor, queries, 7)
  wanted = predictor.predict(queries, 7)
  for answer, labels, query in zip(reply.json["answers"], wanted, queries, strict=True):
    assert answer["uid"] == query["uid"]
    np.testing.assert_allclose([x["score"] for x in answer["predictions"]], [x.score for x in labels], atol=5e-6)


def test_images_come_bare_as_data_urls_or_as_vectors(illustrated, predictor, server):
  query = next(query for query in illustrated.queries if query.get("images"))
  plain = in_base64(query)
  urls = plain | {"images": [f"data:image/png;base64,{image}" for image in plain["images"]]}
  vectors = plain | {"images": [vector.tolist() for vector in predictor.pictures(query["images"])[0]]}
  bare, as_url, as_vector = labels_of(predict(server, plain, urls, vectors))
  assert bare == as_url == as_vector == expected(predictor, [query], 10)[0]
  assert bare != labels_of(predict(server, {key: plain[key] for key in ("title", "content")}))[0]


def test_filters_of_the_request_hold_for_queries_without_their_own(server):
  first, second, third = labels_of(
    predict(
      server,
      {"title": "sun"},
      {"title": "sun", "deny": []},
      {"title": "sun", "allow": ["label/1"]},
      deny=["label/0"],
      allow=["label/0", "label/2"],
    )
  )
  assert [[label[1] for label in labels] for labels in (first, third)] == [[2], [1]]
  assert sorted(label[1] for label in second) == [0, 2]


def test_32_clients_get_what_each_would_get_alone_in_shared_batches_and_nothing_compiles(
  illustrated, predictor, server
):
  rng = np.random.default_rng(0)
  asked = []
  for i in range(64):
    query = dict(illustrated.queries[i % len(illustrated.queries)])
    query["deny"] = [f"label/{label}" for label in rng.permutation(24)[: rng.integers(0, 7)]]
    if i % 5 == 0:
      query["allow"] = [f"label/{label}" for label in rng.permutation(24)[:4]]
    asked.append((query, int(rng.integers(1, 21))))
  alone = expected(predictor, [query for query, _ in asked], 20)
  wanted = [labels[:k] for labels, (_, k) in zip(alone, asked, strict=True)]
  batches, queries = (metric(server, f"vixml_batch_queries_{part}") for part in ("count", "sum"))
  with counted_compilations() as compiled, ThreadPoolExecutor(32) as pool:
    found = list(pool.map(lambda each: labels_of(predict(server, in_base64(each[0]), k=each[1]))[0], asked))
  assert found == wanted
  assert not compiled
  assert metric(server, "vixml_batch_queries_sum") - queries == len(asked)
  assert metric(server, "vixml_batch_queries_count") - batches < len(asked) / 2


def png(width, height, mode="RGB"):
  buffer = io.BytesIO()
  Image.new(mode, (width, height)).save(buffer, "PNG")
  return buffer.getvalue()


def _image(content):
  return {"queries": [{"title": "a"}, {"title": "a", "images": [base64.b64encode(content).decode()]}]}


_GOOD = {"title": "a"}
_BAD = {
  "no JSON": (b"queries", 400, None, "the body is not JSON in UTF-8: "),
  "cut off": (b'{"queries": [{"title": "a"}', 400, None, "not JSON"),
  "no body": (b"", 400, None, "not JSON"),
  "not UTF-8": (b'{"queries": [{"title": "\xff"}]}', 400, None, "not JSON in UTF-8"),
  "half a pair": (rb'{"queries": [{"title": "\ud800"}]}', 400, None, "hex escape"),
  "nested deep": (b"[" * 2_000, 400, None, "not JSON"),
  "a list": ([], 422, "", "object"),
  "no queries": ({}, 422, "queries", "required"),
  "empty queries": ({"queries": []}, 422, "queries", "at least 1"),
  "too many queries": ({"queries": [_GOOD] * 6}, 422, "queries", "at most 5"),
  "queries of a wrong type": ({"queries": "a"}, 422, "queries", "array"),
  "a bare text": ({"queries": ["a"]}, 422, "queries[0]", "object"),
  "unknown key": ({"queries": [_GOOD], "top": 3}, 422, "top", "is not known; known are queries, k, allow"),
  "unknown key of a query": (
    {"queries": [_GOOD, {"title": "a", "color": 1}]},
    422,
    "queries[1].color",
    "known are uid, title, content",
  ),
  "many values": (b"[" + b"0," * 2_001 + b"0]", 413, None, "more than 2,000 values"),
  "no title": ({"queries": [{"content": "a"}]}, 422, "queries[0].title", "required"),
  "empty title": ({"queries": [{"title": "  "}]}, 422, "queries[0].title", "empty; give a title or an image"),
  "title of a wrong type": ({"queries": [{"title": 3}]}, 422, "queries[0].title", "string"),
  "long title": ({"queries": [{"title": "a" * 201}]}, 422, "queries[0].title", "at most 200"),
  "content of a wrong type": ({"queries": [_GOOD | {"content": ["a"]}]}, 422, "queries[0].content", "string"),
  "k of a million": ({"queries": [_GOOD], "k": 10**6}, 422, "k", "less than or equal to 20"),
  "huge k": (b'{"queries": [{"title": "a"}], "k": 1' + b"0" * 5000 + b"}", 400, None, "number out of range"),
  "k of none": ({"queries": [_GOOD], "k": 0}, 422, "k", "greater than or equal to 1"),
  "k of a wrong type": ({"queries": [_GOOD], "k": "10"}, 422, "k", "integer"),
  "k with a point": ({"queries": [_GOOD], "k": 1.5}, 422, "k", "integer"),
  "too many images": ({"queries": [_GOOD | {"images": [""] * 4}]}, 422, "queries[0].images", "at most 3"),
  "image of a wrong type": ({"queries": [_GOOD | {"images": [7]}]}, 422, "queries[0].images[0]", "string; or "),
  "no base64": ({"queries": [_GOOD | {"images": ["/etc/passwd!"]}]}, 422, "queries[0].images[0]", "not base64"),
  "a path": ({"queries": [_GOOD | {"images": ["/etc/hosts00"]}]}, 422, "queries[0].images[0]", "not a PNG"),
  "empty image": ({"queries": [_GOOD | {"images": [""]}]}, 422, "queries[0].images[0]", "no bytes"),
  "no image": (_image(b"GIF is not enough"), 422, "queries[1].images[0]", "not a PNG"),
  "truncated image": (_image(png(64, 64)[:-30]), 422, "queries[1].images[0]", "truncated or damaged"),
  "bomb": (_image(png(12_000, 12_000, "1")), 422, "queries[1].images[0]", "more than 67,108,864 pixels"),
  "short vector": ({"queries": [_GOOD | {"images": [[1.0, 2.0]]}]}, 422, "queries[0]", "must be 8 numbers"),
  "vector of texts": ({"queries": [_GOOD | {"images": [["a"]]}]}, 422, "queries[0].images[0][0]", "number"),
  "vector that is not finite": (
    b'{"queries": [{"title": "a", "images": [[1, 2, 3, 4, 5, 6, 7, NaN]]}]}',
    422,
    "queries[0]",
    "not finite",
  ),
  "unknown label": ({"queries": [_GOOD | {"deny": ["label/1", "label/x"]}]}, 422, "queries[0].deny[1]", "'label/x'"),
  "unknown label for all": ({"queries": [_GOOD], "allow": ["y"]}, 422, "allow[0]", "there is no label 'y'"),
  "unknown category": ({"queries": [_GOOD | {"categories": ["z"]}]}, 422, "queries[0].categories[0]", "category 'z'"),
  "too many labels": ({"queries": [_GOOD | {"deny": ["label/1"] * 7}]}, 422, "queries[0].deny", "at most 6"),
}


@pytest.mark.parametrize("name", _BAD)
def test_a_bad_request_is_refused_by_its_field_while_good_ones_go_on(server, name):
  body, status, field, message = _BAD[name]
  with ThreadPoolExecutor(2) as pool:
    others = [pool.submit(predict, server, {"title": title}) for title in ("sun rain", "cloud")]
    reply = call(server, "/v1/predict", body if isinstance(body, bytes) else json.dumps(body))
    assert [len(labels_of(other.result())[0]) for other in others] == [10, 10]
  assert reply.status == status, reply.body
  error = reply.json["error"]
  assert error["field"] == field and message in error["message"]
  assert len(reply.body) < 300 and str(ROOT) not in reply.body.decode() and "Traceback" not in error["message"]


@pytest.mark.parametrize("length", [None, 30_000_000])
def test_a_huge_body_is_refused_before_it_has_come_and_the_client_hears_of_it(server, length):
  connection = connect(server)
  connection.putrequest("POST", "/v1/predict")
  if length:
    connection.putheader("Content-Length", str(length))
  else:
    connection.putheader("Transfer-Encoding", "chunked")
  connection.endheaders()
  part, sent = b" " * 2**16, 0
  while sent < 30_000_000 // len(part):  # The whole of it, as many clients do before they listen.
    connection.send(part if length else b"%x\r\n%s\r\n" % (len(part), part))
    sent += 1
  connection.send(b" " * (30_000_000 - sent * len(part)) if length else b"0\r\n\r\n")
  reply = Reply(connection.getresponse())
  connection.close()
  assert reply.status == 413 and "200,000 bytes" in reply.json["error"]["message"]
  assert reply.headers["Connection"] == "close"


def test_unknown_paths_and_methods_get_json_errors(server):
  for path, method, status in (("/docs", "GET", 404), ("/v1/predict", "GET", 405), ("/../etc/passwd", "GET", 404)):
    reply = call(server, path, method=method)
    assert reply.status == status and set(reply.json["error"]) == {"field", "message"}


def test_labels_are_found_by_uid(illustrated, server):
  for uid in ("label/3", quote("label/3", safe="")):
    assert call(server, f"/v1/labels/{uid}").json == {
      "label": "label/3",
      "id": 3,
      "text": illustrated.labels[3]["title"] + " " + illustrated.labels[3]["content"],
    }
  assert call(server, "/v1/labels/label/99").status == 404


def test_metrics_tell_encoding_from_search_and_count_routes(server):
  predict(server, {"title": "sun"})
  call(server, "/v1/labels/label/3")
  text = call(server, "/metrics").body.decode()
  for line in (
    'vixml_requests_total{route="/v1/predict",status="200"}',
    "vixml_encode_seconds_bucket",
    'vixml_requests_total{route="/v1/labels/{uid:path}",status="200"}',
    "vixml_search_seconds_bucket",
    "vixml_batch_queries_bucket",
    "vixml_queue_queries 0.0",
    "vixml_labels 24.0",
    'vixml_request_seconds_count{route="/v1/predict"}',
    "process_resident_memory_bytes",
  ):
    assert line in text, line
  before = metric(server, "vixml_encode_seconds_count"), metric(server, "vixml_search_seconds_count")
  predict(server, {"title": "sun"}, {"title": "rain"})
  assert (metric(server, "vixml_encode_seconds_count"), metric(server, "vixml_search_seconds_count")) == (
    before[0] + 1,
    before[1] + 1,
  )


def test_the_description_is_whole_and_names_the_limits(server):
  described = call(server, "/openapi.json").json
  text = json.dumps(described)
  for reference in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text):
    assert reference in described["components"]["schemas"]
  schemas = described["components"]["schemas"]
  assert schemas["PredictRequest"]["properties"]["k"]["maximum"] == LIMITS.k
  assert schemas["PredictRequest"]["properties"]["queries"]["items"]["$ref"].endswith("/Query")
  assert set(described["paths"]) == {"/v1/predict", "/v1/labels/{uid}", "/healthz", "/metrics"}


def test_the_page_loads_nothing_from_elsewhere(server):
  page = call(server, "/")
  assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
  assert page.headers["Content-Type"] == "text/html; charset=utf-8"
  links = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
  assert {"/page.css", "/page.js"} <= set(links)
  for link in links:
    if not link.startswith("data:"):
      reply = call(server, link)
      assert reply.status == 200 and b"http://" not in reply.body


def test_bodies_that_come_slowly_and_too_many_queries_are_refused(predictor):
  limits = Limits(body_seconds=0.2, queue=2, batch=2)
  with running(lambda: predictor, limits) as server:
    reply = predict(server, *[{"title": "sun"}] * 3)
    assert reply.status == 503 and reply.headers["Retry-After"] == "1"
    assert reply.json["error"]["message"].startswith("too many queries are waiting")
    assert labels_of(predict(server, *[{"title": "sun"}] * 2))
    connection = connect(server)
    connection.putrequest("POST", "/v1/predict")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"que')
    assert connection.getresponse().status == 408
    connection.close()


def test_bodies_share_their_memory(predictor):
  with running(lambda: predictor, Limits(bodies_bytes=1_000)) as server:
    slow = connect(server)
    slow.putrequest("POST", "/v1/predict")
    slow.putheader("Content-Length", "900")
    slow.endheaders(b"{")
    body = json.dumps({"queries": [{"title": "sun" + " " * 200}]})
    wait_for(lambda: call(server, "/v1/predict", body).status == 503)
    slow.close()
    wait_for(lambda: call(server, "/v1/predict", body).status == 200)


def test_it_says_that_it_is_starting_and_then_that_it_is_ready(predictor):
  loaded = threading.Event()
  with running(lambda: loaded.wait() and predictor, ready=False) as server:
    wait_for(lambda: call(server, "/healthz").json["status"] == "starting")
    assert call(server, "/healthz").status == 503
    assert predict(server, {"title": "sun"}).status == 503
    loaded.set()
    wait_for(lambda: call(server, "/healthz").status == 200)
    health = call(server, "/healthz").json
    assert health["labels"] == 24 and health["images"] == 2 and health["pictures"] and health["search"] == "exact"
    assert predict(server, {"title": "sun"}).status == 200


def test_what_cannot_be_loaded_ends_it_with_the_reason(tmp_path):
  server = Server(functools.partial(vixml_jax.load, tmp_path))
  with pytest.raises(InputError, match="config.json"):
    server.run()


def test_an_address_in_use_is_refused():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(InputError, match=f"--port={port}: cannot be listened on .*in use"):
      Server(lambda: None, port=port)


def test_requests_in_flight_are_answered_before_it_stops(predictor):
  limits = Limits(wait_seconds=1.0)
  with running(lambda: predictor, limits) as server, ThreadPoolExecutor(1) as pool:
    asked = pool.submit(predict, server, {"title": "sun"})
    wait_for(lambda: metric(server, "vixml_queue_queries") == 1)
    server.stop()
    assert labels_of(asked.result()) == expected(predictor, ["sun"], 10)
  with pytest.raises(ConnectionRefusedError):
    call(server, "/healthz")


def test_without_its_tower_it_refuses_pictures_and_takes_vectors(illustrated, tmp_path, caplog):
  load = functools.partial(vixml_jax.load, illustrated.workdir, image_checkpoint=str(tmp_path / "none.npz"))
  with running(load) as server:
    assert not call(server, "/healthz").json["pictures"] and "pictures are refused" in caplog.text
    reply = predict(server, {"title": "sun", "images": [base64.b64encode(png(8, 8)).decode()]})
    assert reply.status == 422 and "reads no pictures" in reply.json["error"]["message"]
    assert labels_of(predict(server, {"title": "sun", "images": [[0.5] * 8]}))


def test_a_new_snapshot_of_the_index_is_taken_over_while_requests_go_on(tmp_path_factory, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(trained_workdirs.texts_only(tmp_path_factory).workdir, workdir)
  load = functools.partial(vixml_jax.load, workdir, retrieval_augmented=True)
  statuses, done = [], threading.Event()

  def ask(server):
    while not done.is_set():
      reply = predict(server, {"title": "sun", "allow": ["label/0", "label/1"]})
      statuses.append((reply.status, len(reply.json["answers"][0]["predictions"])))

  with running(load) as server, ThreadPoolExecutor(4) as pool:
    assert call(server, "/healthz").json["retrieval_augmented"]
    asking = [pool.submit(ask, server) for _ in range(4)]
    wait_for(lambda: (200, 2) in statuses)
    LabelIndex.open(workdir / "index", checkpoint=None).delete([0])
    server.reload()
    wait_for(lambda: call(server, "/healthz").json["labels"] == 23)
    wait_for(lambda: statuses[-1] == (200, 1))
    current = workdir / "index" / "CURRENT"
    valid = current.read_text()
    current.write_text("rubbish")
    server.reload()
    wait_for(lambda: metric(server, "vixml_index_reloads_total") == 2)
    current.write_text(valid)
    done.set()
    for each in asking:
      each.result()
    assert set(statuses) == {(200, 2), (200, 1)}
    text = call(server, "/metrics").body.decode()
    assert 'reloads_total{outcome="done"} 1.0' in text and 'reloads_total{outcome="failed"} 1.0' in text
    assert call(server, "/v1/labels/label/0").status == 404
    assert call(server, "/v1/labels/label/1").status == 200


def test_retrieval_augmentation_gives_what_the_api_gives(tmp_path_factory):
  trained = trained_workdirs.texts_only(tmp_path_factory)
  predictor = vixml_jax.load(trained.workdir, retrieval_augmented=True)
  with running(lambda: predictor) as server:
    queries = [
      {"title": query["title"]} | {key: query[key] for key in ("deny",) if key in query}
      for query in trained.queries[:5]
    ]
    assert labels_of(predict(server, *queries, k=6)) == expected(predictor, queries, 6)


def test_a_picture_that_breaks_late_fails_its_own_query_only(predictor):
  engine = Engine(lambda: predictor, LIMITS, Metrics())
  engine.start()
  broken = Query("sun", (png(8, 8), b"broken"), where="queries[4]")
  asked = [QueryRequest(Query("sun"), 3), QueryRequest(broken, 3), QueryRequest(Query("rain"), 5)]
  first, second, third = engine.answer(asked)
  assert [tuple(x[:3]) for x in first] == expected(predictor, ["sun"], 3)[0] and len(third) == 5
  assert isinstance(second, RequestError) and (second.status, second.field) == (422, "queries[4].images[1]")


def test_a_failure_of_ours_is_a_500_without_its_insides(predictor, monkeypatch, caplog):
  with running(lambda: predictor) as server:
    monkeypatch.setattr(Predictor, "search", lambda *_: 1 / 0)
    reply = predict(server, {"title": "sun"})
    monkeypatch.undo()
    assert reply.status == 500 and reply.json["error"] == {
      "field": None,
      "message": "the server failed on this request; its log says why",
    }
    wait_for(lambda: "ZeroDivisionError" in caplog.text)  # It is written after the answer is sent.
    assert predict(server, {"title": "sun"}).status == 200


def test_batches_gather_what_waits_and_split_what_fails():
  batches, go = [], threading.Event()

  def answer(asked):
    batches.append(list(asked))
    go.wait()
    if len(asked) > 1 and 7 in asked:
      raise RuntimeError("a batch with 7")
    if asked == [7]:
      raise ValueError("7 alone")
    return [KeyError(number) if number == 3 else 10 * number for number in asked]

  batcher = Batcher(answer, max_batch=4, max_wait=0, max_queue=6)
  first = batcher.submit([0])
  wait_for(lambda: batches)
  rest = batcher.submit([1, 2, 3, 5]) + batcher.submit([6, 7])
  with pytest.raises(QueueFull):
    batcher.submit([8])
  assert len(batcher) == 6
  go.set()
  batcher.close()
  assert [future.exception() or future.result() for future in (*first, *rest[:2], *rest[3:5])] == [0, 10, 20, 50, 60]
  assert isinstance(rest[2].exception(), KeyError) and isinstance(rest[5].exception(), ValueError)
  assert batches == [[0], [1, 2, 3, 5], [6, 7], [6], [7]]
  with pytest.raises(QueueFull):
    batcher.submit([9])


def test_a_batch_waits_for_others_but_not_for_long():
  batches = []
  batcher = Batcher(lambda asked: batches.append(asked) or asked, max_batch=3, max_wait=0.3, max_queue=9)
  started = time.monotonic()
  futures = batcher.submit([1])
  time.sleep(0.05)
  futures += batcher.submit([2])
  assert [future.result() for future in futures] == [1, 2] and 0.25 < time.monotonic() - started < 5
  started = time.monotonic()
  assert [future.result() for future in batcher.submit([3, 4, 5])] == [3, 4, 5]
  assert time.monotonic() - started < 0.25
  batcher.close()
  assert [len(batch) for batch in batches] == [2, 3]


@pytest.mark.parametrize("gather", [4, 10_000])
def test_few_programs_find_what_exact_search_finds(tmp_path, monkeypatch, gather):
  """With every kind of filter, against brute force; allow lists above `gather` are masked on the devices."""
  for module in (served_index, search_filters):
    monkeypatch.setattr(module, "GATHER_AT_MOST", gather)
  rng = np.random.default_rng(0)
  labels, queries = (rng.standard_normal((rows, 8), np.float32) for rows in (150, 13))
  groups = [["all", "odd"] if i % 2 else ["all"] for i in range(150)]
  gone = rng.random(150) < 0.1
  names = [str(i) for i in range(150)]
  write_index(
    tmp_path / "index",
    IndexContents(labels, names, names, np.zeros(150, np.int32), np.zeros((1, 8), np.float32), gone, categories=groups),
    checkpoint={},
    search="exact",
  )
  index = ServedIndex.open(tmp_path / "index", checkpoint=None)
  for program in index.warm_up(40, 13, None):
    program()
  with counted_compilations() as compiled:
    for k in (1, 9, 17, 30):
      deny = [rng.permutation(150)[: rng.integers(0, 10)] for _ in queries]
      allow = [None if i % 3 == 0 else rng.permutation(150)[: 2 * i] for i in range(13)]
      classes = [["odd"] if i % 4 == 1 else None for i in range(13)]
      filters = index.filters(
        *([None if row is None else [str(label) for label in row] for row in rows] for rows in (allow, deny)),
        categories=classes,
      )
      for filtered in (None, Filters(deny=filters.deny), filters):
        scores, ids = index.search(queries, k, filtered)
        for i, query in enumerate(queries):
          may = ~gone.copy()
          if filtered is not None:
            may[deny[i]] = False
          if filtered is filters:
            may &= True if allow[i] is None else np.isin(np.arange(150), allow[i])
            may &= True if classes[i] is None else np.arange(150) % 2 == 1
          best = np.flatnonzero(may)[np.argsort(-(labels @ query)[may], kind="stable")][:k]
          assert ids[i].tolist() == best.tolist() + [-1] * (k - len(best))
          np.testing.assert_allclose(scores[i][: len(best)], (labels @ query)[best], rtol=1e-5)
  assert not compiled
  with counted_compilations() as compiled:
    LabelIndex.search(index, queries, 11 if gather == 4 else 12)  # Programs are kept: another one for each case.
  assert compiled


def test_warming_up_reaches_every_program_of_the_encoder(predictor, monkeypatch):
  encoder = dataclasses.replace(predictor.encoder, layout=dataclasses.replace(predictor.encoder.layout, chunk_rows=32))
  larger = dataclasses.replace(predictor, encoder=encoder)
  for program in engine_module._encoders(larger, 28):
    program()
  warm = set(encoder._encoders)
  assert warm == {8, 16, 32}
  rng = np.random.default_rng(0)
  with counted_compilations() as compiled:
    for count in range(1, 29, 3):
      encoder.embed(
        ["sun " * int(rng.integers(0, 40)) for _ in range(count)],
        [[np.ones(8, np.float16)] * int(rng.integers(0, 3)) for _ in range(count)],
      )
  assert set(encoder._encoders) == warm and not compiled


def start_command(workdir, *flags):
  """`python -m vixml_jax.serve`, ready, and its address."""
  environment = os.environ | {"XLA_FLAGS": ""}
  process = subprocess.Popen(
    [sys.executable, "-m", "vixml_jax.serve", f"--workdir={workdir}", "--port=0", *flags],
    cwd=ROOT,
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  lines = []
  for line in process.stderr:
    lines.append(line)
    if " ready after" in line:
      break
  assert process.poll() is None, "".join(lines)
  return process, re.search(r"listening on (\S+)", "".join(lines))[1]


class _Address:
  def __init__(self, url):
    self.url = url


@pytest.mark.slow
@pytest.mark.parametrize("flags,signals", [((), [signal.SIGHUP]), (("--reload_index=0.2",), [])])
def test_the_command_reloads_on_sighup_or_by_looking_and_ends_on_sigterm(tmp_path_factory, tmp_path, flags, signals):
  workdir = tmp_path / "run"
  shutil.copytree(trained_workdirs.texts_only(tmp_path_factory).workdir, workdir)
  process, url = start_command(workdir, *flags)
  try:
    server = _Address(url)
    assert call(server, "/healthz").json["labels"] == 24
    LabelIndex.open(workdir / "index", checkpoint=None).delete([0])
    for number in signals:
      process.send_signal(number)
    wait_for(lambda: call(server, "/healthz").json["labels"] == 23)
    assert predict(server, {"title": "sun"}).status == 200
  finally:
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
  assert process.returncode == 0 and "Traceback" not in stderr, stderr


@pytest.mark.slow
def test_the_page_finds_labels_in_a_browser(illustrated, predictor, server, tmp_path):
  sync_api = pytest.importorskip("playwright.sync_api", reason="a browser tests the page: pip install playwright")
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if not chromium:
    pytest.skip("a browser tests the page: install chromium")
  query = next(query for query in illustrated.queries if query.get("images"))
  picture, other = tmp_path / "first.png", tmp_path / "notes.txt"
  picture.write_bytes(query["images"][0])
  other.write_text("no picture")
  screenshots = Path(os.environ.get("SCREENSHOTS", tmp_path))
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 900, "height": 900})
    complaints = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    page.get_by_text("24 labels, exact search").wait_for()
    page.screenshot(path=screenshots / "empty.png")
    page.keyboard.type(query["title"])  # The title has the focus.
    page.keyboard.press("Enter")
    page.get_by_role("status").get_by_text("10 labels").wait_for()
    wanted = predictor.predict([{"title": query["title"]}])[0]
    assert page.locator("#labels .uid").all_inner_texts() == [found.label for found in wanted]
    assert page.locator("#labels .score").all_inner_texts() == [f"{found.score:.3f}" for found in wanted]
    _drop(page, picture)
    page.get_by_role("button", name="Remove first.png").wait_for()
    page.get_by_role("button", name="Find labels").click()
    wanted = predictor.predict([{"title": query["title"], "images": [query["images"][0]]}])[0]
    page.locator("#labels .score", has_text=f"{wanted[0].score:.3f}").first.wait_for()
    assert page.locator("#labels .uid").all_inner_texts() == [found.label for found in wanted]
    page.screenshot(path=screenshots / "light.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=screenshots / "dark.png", full_page=True)
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=screenshots / "narrow.png", full_page=True)
    page.get_by_label("Pictures", exact=False).first.set_input_files(other)
    page.get_by_text("Only image files can be added.").wait_for()
    other.with_suffix(".png").write_bytes(b"no picture")
    page.get_by_label("Pictures", exact=False).first.set_input_files(other.with_suffix(".png"))
    page.get_by_label("Title").press("Enter")
    page.get_by_text("notes.png: not a PNG").wait_for()
    page.screenshot(path=screenshots / "error.png", full_page=True)
    page.get_by_role("button", name="Remove notes.png").press("Enter")
    assert page.get_by_role("button", name="Remove").count() == 1
    assert [text for text in complaints if "422" not in text] == []
    hostile = {"label": "<b>x</b>", "id": 0, "text": "<img src=x onerror=alert(1)>", "score": 0.5}
    answers = {"answers": [{"uid": None, "predictions": [hostile]}]}
    page.route("**/v1/predict", lambda route: route.fulfill(json=answers))
    page.get_by_role("button", name="Find labels").click()
    page.get_by_text(hostile["text"]).wait_for()
    assert page.locator("#labels img, #labels b").count() == 0
    browser.close()


def _drop(page, path):
  """Drops a file onto the page, as a hand would."""
  data = page.evaluate_handle(
    """([name, content]) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], name, {type: "image/png"}));
        return data;
      }""",
    [path.name, base64.b64encode(path.read_bytes()).decode()],
  )
  page.dispatch_event("#drop", "dragover", {"dataTransfer": data})
  page.dispatch_event("#drop", "drop", {"dataTransfer": data})
