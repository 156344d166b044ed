"""Bodies of requests are answered, or refused with a status and the field that is wrong."""

import json

import pytest

from tests.bad_input import campaign, requests
from tests.helpers.http_server import call, quick_to_stop, running
from vixml_jax.inference.loading import load_predictor


@pytest.fixture(scope="module")
def server(with_images):
  predictor = load_predictor(with_images.workdir)
  with quick_to_stop(), running(lambda: predictor) as server:
    yield server


# What the campaign found.
_FOUND = [
  *(
    ("/v1/predict", {"queries": [{"title": "a", "images": [vector]}]}, 422, "queries[0]")
    for vector in ([1e300] * requests.DIM, [-1e39] + [0.0] * (requests.DIM - 1))
  ),
  *(
    ("/v1/embeddings", {"input": "a", "model": "run", "encoding_format": value}, 400, "encoding_format")
    for value in ([], "", {}, 0, False)
  ),
]


def _check(server, tally, case):
  path, body, status, field = case
  reply = tally.attempt(lambda: call(server, path, body))
  assert reply.status in (status if isinstance(status, tuple) else (status,)), (reply.status, reply.body[:500])
  if status == 200:
    answers = reply.json["answers"]
    assert [answer["uid"] for answer in answers] == [query.get("uid") for query in field["queries"]]
    for answer, query in zip(answers, field["queries"], strict=True):
      found = [label["label"] for label in answer["predictions"]]
      assert len(found) == len(set(found)) <= field.get("k", 10)
      assert not set(found) & set(query.get("deny", ()))
      assert not query.get("allow") or set(found) <= set(query["allow"])
    return
  tally.refused += 1
  error = json.loads(reply.body)["error"]
  assert "\n" not in error["message"] and len(reply.body) < 1_000
  found = error["param" if path == "/v1/embeddings" else "field"]
  assert field is None or found.startswith(field), error


@pytest.mark.parametrize("path, body, status, field", _FOUND)
def test_what_was_found_is_refused(server, path, body, status, field):
  _check(server, campaign.Tally(), (path, json.dumps(body).encode(), status, field))


@campaign.examples_of_each(60)
def test_requests(server, each, record_property):
  check = lambda tally, case: _check(server, tally, case)
  campaign.run("bodies of requests", requests.MUTATIONS, check, each, record_property)
