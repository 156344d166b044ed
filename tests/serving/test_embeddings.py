"""`POST /v1/embeddings` and `GET /v1/models` answer the client library of OpenAI, and refuse what they cannot do."""

import base64
import json
import shutil

import numpy as np
import openai
import pytest

from tests.helpers.documents import ROOT, Document
from tests.helpers.http_server import call, running
from vixml_jax.inference.loading import load_predictor


@pytest.fixture(scope="module")
def client(server):
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
    yield client


@pytest.fixture(scope="module")
def model(client):
  (model,) = client.models.list().data
  return model.id


def test_the_client_of_openai_gets_the_embeddings_of_the_model(client, model, predictor):
  texts = ["sun rain", "cloud", "sun " * 40]
  wanted = predictor.encode(texts)
  for encoding in ("float", "base64", None):  # Without a format, the client asks for base64 and decodes it.
    given = {} if encoding is None else {"encoding_format": encoding}
    found = client.embeddings.create(model=model, input=texts, **given)
    assert [each.index for each in found.data] == [0, 1, 2] and found.model == model
    values = [each.embedding for each in found.data]
    if encoding == "base64":
      values = [np.frombuffer(base64.b64decode(value), "<f4") for value in values]
    np.testing.assert_allclose(values, wanted, atol=1e-6)
  tokens = sum(len(row) for row in predictor.encoder.tokenizer(texts))
  assert (found.usage.prompt_tokens, found.usage.total_tokens) == (tokens, tokens)
  alone = client.embeddings.create(model=model, input="cloud", dimensions=wanted.shape[1], user="someone")
  np.testing.assert_allclose(alone.data[0].embedding, wanted[1], atol=1e-6)


@pytest.fixture(scope="module")
def with_prefixes(texts_only, tmp_path_factory):
  """Workdir of a model whose config says that it was trained with prefixes; its embeddings have 32 values."""
  workdir = tmp_path_factory.mktemp("prefixes") / "run"
  shutil.copytree(texts_only.workdir, workdir)
  config = json.loads((workdir / "config.json").read_text())
  config["train"]["matryoshka_dims"] = [32, 16, 4]
  (workdir / "config.json").write_text(json.dumps(config))
  return workdir


def test_dimensions_that_the_model_was_trained_for_give_first_values_of_unit_norm(with_prefixes):
  predictor = load_predictor(with_prefixes)
  texts = ["sun rain", "cloud"]
  whole = predictor.encode(texts)
  with (
    running(lambda: predictor) as server,
    openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
  ):
    (model,) = client.models.list().data
    for dims in (4, 16, 32):
      cut = whole[:, :dims] / np.linalg.norm(whole[:, :dims], axis=1, keepdims=True)
      for encoding in ("float", "base64"):
        found = client.embeddings.create(model=model.id, input=texts, dimensions=dims, encoding_format=encoding)
        values = [each.embedding for each in found.data]
        if encoding == "base64":
          values = [np.frombuffer(base64.b64decode(value), "<f4") for value in values]
        np.testing.assert_allclose(values, cut, atol=1e-6)
    for dims in (0, 8, 33):
      with pytest.raises(openai.BadRequestError, match="must be 32, the dimension .* trained for: 16, 4") as refused:
        client.embeddings.create(model=model.id, input=texts, dimensions=dims)
      assert refused.value.param == "dimensions"


def test_the_example_of_the_page_runs(server, predictor):
  (code,) = [block.code for block in Document.read(ROOT / "docs/serving.md").blocks if block.language == "python"]
  names = {}
  exec(code.replace("http://127.0.0.1:8080", server.url), names)
  names["client"].close()
  wanted = predictor.encode(["arrow up", "cloud"])
  np.testing.assert_allclose([each.embedding for each in names["response"].data], wanted, atol=1e-6)


def test_the_models_are_listed(client, model, with_images):
  assert model == with_images.workdir.name
  assert client.models.retrieve(model).owned_by == "vixml_jax"
  with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
    client.models.retrieve("gpt")


_BAD = {
  "other model": ({"model": "gpt", "input": "a"}, 404, "model", "there is no model 'gpt'"),
  "no model": ({"model": None, "input": "a"}, 400, "model", "must be the name of a model"),
  "tokens": ({"input": [1, 2]}, 400, "input[0]", "token ids are not accepted"),
  "lists of tokens": ({"input": [[1, 2], [3]]}, 400, "input[0]", "token ids are not accepted"),
  "nothing": ({}, 400, "input", "a text or a list"),
  "no texts": ({"input": []}, 400, "input", "a text or a list"),
  "too many": ({"input": ["a"] * 6}, 400, "input", "send at most 5"),
  "empty": ({"input": ["a", " "]}, 400, "input[1]", "is empty"),
  "a number": ({"input": [None]}, 400, "input[0]", "must be a text"),
  "long": ({"input": "a" * 201}, 400, "input[0]", "more than 200 characters"),
  "dimensions": ({"input": "a", "dimensions": 7}, 400, "dimensions", "the dimension of the model"),
  "format": ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "float or base64"),
  "unknown key": ({"input": "a", "truncate": True}, 400, "truncate", "is not known"),
}


@pytest.mark.parametrize("name", _BAD)
def test_a_bad_request_gets_an_error_in_the_form_of_openai(server, model, name):
  given, status, field, message = _BAD[name]
  reply = call(server, "/v1/embeddings", json.dumps({"model": model} | given))
  error = reply.json["error"]
  assert (reply.status, error["param"], error["type"]) == (status, field, "invalid_request_error")
  assert message in error["message"]


def test_a_body_without_json_is_refused(server):
  for body in (b"{", b"[]", b"\xff", b"3"):
    reply = call(server, "/v1/embeddings", body)
    assert reply.status == 400 and reply.json["error"]["type"] == "invalid_request_error"


def test_a_body_of_many_values_is_refused_before_it_is_parsed(server, model):
  reply = call(server, "/v1/embeddings", b"[" + b"0," * 2_001 + b"0]")
  assert reply.status == 413 and "more than 2,000 values" in reply.json["error"]["message"]
