"""The engine compiles every program before the first request, and keeps failures to their own query."""

import dataclasses

import numpy as np

from tests.helpers.compilations import counted_compilations
from tests.helpers.http_server import LIMITS, expected, png
from vixml_jax import manifest
from vixml_jax.files import sha256_of_file
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.queries import Query
from vixml_jax.serving.engine import Engine, QueryRequest
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.rankings import Rankings
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.request_filters import join_filters, resolve_filters


def test_an_image_that_breaks_late_fails_its_own_query_only(predictor):
  engine = Engine(lambda: Rankings.of(predictor), LIMITS, Metrics())
  engine.start()
  broken = Query("sun", (png(8, 8), b"broken"), where="queries[4]")
  queries = [Query("sun"), broken, Query("rain")]
  tokens = predictor.encoder.tokenizer([query.text for query in queries])
  asked = [QueryRequest(query, tokens[i], (3, 3, 5)[i]) for i, query in enumerate(queries)]
  first, second, third = engine.answer(asked)
  assert [tuple(x[:3]) for x in first.labels] == expected(predictor, ["sun"], 3)[0] and len(third.labels) == 5
  assert isinstance(second, RequestError) and (second.status, second.field) == (422, "queries[4].images[1]")


def test_warming_up_reaches_every_program_of_the_encoder(predictor, monkeypatch):
  encoder = dataclasses.replace(predictor.encoder, layout=dataclasses.replace(predictor.encoder.layout, chunk_rows=32))
  with counted_compilations() as warm:
    for program in encoder.warm_up(28):
      program()
  assert len(warm) >= 4  # Chunks of 8, 16, 24 and 32 rows.
  rng = np.random.default_rng(0)
  with counted_compilations() as compiled:
    for count in range(1, 29, 3):
      encoder.embed(
        ["sun " * int(rng.integers(0, 40)) for _ in range(count)],
        [[np.ones(8, np.float16)] * int(rng.integers(0, 3)) for _ in range(count)],
      )
  assert not compiled


def test_every_file_of_the_index_is_hashed_once_at_start(texts_only, monkeypatch):
  hashed = []
  monkeypatch.setattr(manifest, "sha256_of_file", lambda path: hashed.append(path) or sha256_of_file(path))
  engine = Engine(lambda: Rankings.of(load_predictor(texts_only.workdir)), LIMITS, Metrics())
  engine.start()
  assert not engine.reload_index()
  assert len(hashed) == len(set(hashed))  # Files of the checkpoint are hashed as well.
  of_index = [path for path in hashed if texts_only.workdir / "index" in path.parents]
  assert len(of_index) == len(engine.model.labels.info["files"])


def test_filters_of_a_batch_are_those_of_its_requests(predictor):
  rng = np.random.default_rng(0)

  def names():
    return [f"label/{label}" for label in rng.permutation(24)[: rng.integers(0, 9)]]

  requests = [{"queries": [{}, {"deny": names()}, {"allow": names()}], "allow": names()} for _ in range(3)]
  requests += [{"queries": [{}, {}]}, {"queries": [{"deny": names()}], "deny": names()}]
  batch = [(request, row) for request in requests for row in range(len(request["queries"]))][::-1][1:]
  resolved = {id(request): resolve_filters(request, predictor.index) for request in requests}
  found = join_filters([(resolved[id(request)], row) for request, row in batch])
  ids = np.tile(np.arange(24), (len(batch), 1))
  wanted = [request | request["queries"][row] for request, row in batch]
  for row, query in zip(found.permits(ids), wanted, strict=True):
    allowed = {f"label/{i}" for i in range(24)} if "allow" not in query else set(query["allow"])
    assert {f"label/{i}" for i in np.flatnonzero(row)} == allowed - set(query.get("deny", ()))
  assert resolved[id(requests[3])] is None and join_filters([(None, 0), (None, 1)]) is None
