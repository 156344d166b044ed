"""Requests get the answers of the Python API, in shared batches; bad ones get an error with the field that is wrong."""

import base64
from concurrent.futures import ThreadPoolExecutor
import json
import re
from urllib.parse import quote

import numpy as np
import pytest

from tests.helpers.compilations import counted_compilations
from tests.helpers.http_server import LIMITS, Reply, call, connect, expected, in_base64, labels_of, metric, png, predict
from tests.helpers.miniature_runs import ROOT
from vixml_jax.encoding import item_encoder
from vixml_jax.images import tower
from vixml_jax.inference import trained_encoder
from vixml_jax.search.label_index import LabelIndex


def test_answers_are_those_of_the_api(with_images, predictor, server):
  queries = with_images.queries[:4]
  given = [in_base64(query) for query in queries]
  assert any("images" in query for query in given) and any("deny" in query for query in given)
  reply = predict(server, *given, k=7)
  assert labels_of(reply) == expected(predictor, queries, 7)
  wanted = predictor.predict(queries, 7)
  for answer, labels, query in zip(reply.json["answers"], wanted, queries, strict=True):
    assert answer["uid"] == query["uid"]
    np.testing.assert_allclose([x["score"] for x in answer["predictions"]], [x.score for x in labels], atol=5e-6)


def test_images_come_bare_as_data_urls_or_as_vectors(with_images, predictor, server):
  query = next(query for query in with_images.queries if query.get("images"))
  plain = in_base64(query)
  urls = plain | {"images": [f"data:image/png;base64,{image}" for image in plain["images"]]}
  vectors = plain | {"images": [vector.tolist() for vector in predictor.image_encoder(query["images"])[0]]}
  bare, as_url, as_vector = labels_of(predict(server, plain, urls, vectors))
  assert bare == as_url == as_vector == expected(predictor, [query], 10)[0]
  assert bare != labels_of(predict(server, {key: plain[key] for key in ("title", "content")}))[0]


def test_a_request_is_packed_once_its_names_are_looked_up_once_and_each_image_is_decoded_once(
  with_images, predictor, server, monkeypatch
):
  query = max(with_images.queries, key=lambda query: len(query.get("images", ())))
  queries = [query | {"deny": ["label/0"]}, {"title": "sun"}]
  wanted = expected(predictor, queries, 10)
  calls = []

  def count(owner, name):
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))

  count(tower, "decode")
  count(LabelIndex, "filters")
  count(trained_encoder, "pack")
  count(item_encoder, "pack")
  found = labels_of(predict(server, *map(in_base64, queries)))
  assert found == wanted
  assert len(query["images"]) == 3  # The model uses two of them.
  assert sorted(calls) == ["decode", "decode", "filters", "pack"]


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
  with_images, predictor, server
):
  rng = np.random.default_rng(0)
  asked = []
  for i in range(64):
    query = dict(with_images.queries[i % len(with_images.queries)])
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
def test_a_bad_request_is_refused_with_its_field_while_good_ones_are_answered(server, name):
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
def test_a_huge_body_is_refused_before_it_has_arrived_and_the_client_gets_the_response(server, length):
  connection = connect(server)
  connection.putrequest("POST", "/v1/predict")
  connection.putheader("Content-Type", "application/json")
  if length:
    connection.putheader("Content-Length", str(length))
  else:
    connection.putheader("Transfer-Encoding", "chunked")
  connection.endheaders()
  part, sent = b" " * 2**16, 0
  while sent < 30_000_000 // len(part):  # Many clients send the whole body before they read the response.
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


def test_labels_are_found_by_uid(with_images, server):
  for uid in ("label/3", quote("label/3", safe="")):
    assert call(server, f"/v1/labels/{uid}").json == {
      "label": "label/3",
      "id": 3,
      "text": with_images.labels[3]["title"] + " " + with_images.labels[3]["content"],
    }
  assert call(server, "/v1/labels/label/99").status == 404


def test_metrics_time_encoding_and_search_and_count_routes(server):
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


def test_the_openapi_description_is_complete_and_has_the_limits(server):
  described = call(server, "/openapi.json").json
  text = json.dumps(described)
  for reference in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text):
    assert reference in described["components"]["schemas"]
  schemas = described["components"]["schemas"]
  assert schemas["PredictRequest"]["properties"]["k"]["maximum"] == LIMITS.k
  assert schemas["PredictRequest"]["properties"]["queries"]["items"]["$ref"].endswith("/PredictQuery")
  assert set(described["paths"]) == {
    "/v1/predict",
    "/v1/embeddings",
    "/v1/models",
    "/v1/models/{name}",
    "/v1/labels/{uid}",
    "/v1/suggestions",
    "/healthz",
    "/readyz",
    "/metrics",
  }
