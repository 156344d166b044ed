"""An explained answer names the training queries that are similar and have the label, and the words in common."""

import re

import numpy as np
import pytest

from tests.helpers.http_server import call, labels_of, predict, running
from tests.helpers.miniature import read_lines
from vixml_jax.datasets.raw import SPLITS
from vixml_jax.inference.loading import load_predictor
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.serving.explanations import Detail, explain


@pytest.fixture(scope="module")
def blend(texts_only):
  return load_predictor(texts_only.workdir, ranking="blend")


@pytest.fixture(scope="module")
def server(blend):
  with running(lambda: blend) as server:
    yield server


def _words(text):
  return [word for word in re.findall(r"\w+", text.lower()) if len(word) > 1]


def test_neighbors_are_the_nearest_training_queries_that_have_the_label(server, blend, texts_only):
  title = texts_only.queries[0]["title"]
  plain = predict(server, {"title": title}, k=8)
  reply = predict(server, {"title": title}, k=8, explain=True)
  assert labels_of(reply) == labels_of(plain) and "why" not in plain.json["answers"][0]["predictions"][0]
  rows = read_lines(texts_only.raw / SPLITS["train"].rows)
  cosines = texts_only.embeddings("train_queries") @ blend.encode([title])[0]
  labels_of_queries = blend.index.query_labels
  seen = 0
  for label in reply.json["answers"][0]["predictions"]:
    having = [row for row in range(len(rows)) if label["id"] in labels_of_queries[row]]
    wanted = sorted(having, key=lambda row: -cosines[row])[:3]
    near = label["why"]["neighbors"]
    assert [each["row"] for each in near] == wanted
    np.testing.assert_allclose([each["score"] for each in near], cosines[wanted], atol=1e-5)
    for each in near:
      assert each["text"] == rows[each["row"]]["title"]
      assert set(each["words"]) == {*_words(title)} & {*_words(rows[each["row"]]["title"])}
      assert [found["id"] for found in each["labels"]] == labels_of_queries[each["row"]][:5].tolist()
      seen += 1
    assert label["why"]["words"] == [word for word in dict.fromkeys(_words(title)) if word in _words(label["text"])]
  assert seen


def test_only_the_queries_of_a_batch_that_ask_are_explained(server, texts_only):
  queries = [{"title": query["title"]} for query in texts_only.queries[:3]]
  reply = predict(server, *queries, k=2, explain=True, ranking="plain")
  assert all(len(found["why"]["neighbors"]) <= 3 for answer in reply.json["answers"] for found in answer["predictions"])
  assert call(server, "/healthz").json["explain"] is True


@pytest.mark.parametrize("detail", ["rows", "none"])
def test_a_server_can_leave_out_the_texts_of_training_queries_and_all_explanations(blend, texts_only, detail):
  with running(lambda: blend, detail=Detail(detail)) as server:
    reply = predict(server, {"title": texts_only.queries[0]["title"]}, k=8, explain=True)
    assert call(server, "/healthz").json["explain"] is (detail == "rows")
  if detail == "none":
    assert reply.status == 422 and reply.json["error"]["field"] == "explain"
    assert "does not explain answers" in reply.json["error"]["message"]
    return
  found = [near for label in reply.json["answers"][0]["predictions"] for near in label["why"]["neighbors"]]
  assert found and {near["text"] for near in found} == {None}


def test_an_index_without_texts_explains_by_rows_and_one_without_a_blend_finds_words_in_texts(
  blend, texts_only, monkeypatch
):
  (title,), index = [texts_only.queries[0]["title"]], blend.index
  embeddings, found = blend.encode([title]), blend.predict([title], 8)
  explained = lambda: [near for why in explain(index, 50, [title], embeddings, found)[0] for near in why["neighbors"]]
  by_blend = explained()
  monkeypatch.setattr(LabelIndex, "blend", None)
  assert explained() == by_blend and any(near["words"] for near in by_blend)
  monkeypatch.setattr(LabelIndex, "query_texts", None)
  assert explained() == [near | {"text": None, "words": []} for near in by_blend]


def test_without_training_queries_an_explanation_is_refused(blend, texts_only):
  plain = load_predictor(texts_only.workdir)
  with running(lambda: plain, rankings=["plain"]) as server:
    reply = predict(server, {"title": "sun"}, explain=True)
    assert reply.status == 422 and reply.json["error"]["field"] == "explain"
    assert call(server, "/healthz").json["explain"] is False


def test_suggestions_are_the_texts_of_frequent_labels(server, blend):
  found = call(server, "/v1/suggestions").json
  counts = np.bincount(blend.index.query_labels.values, minlength=24)
  texts = blend.index.texts(np.argsort(-counts, kind="stable"))
  assert found == {"queries": [text for text in dict.fromkeys(texts) if len(text) <= 60][:6], "categories": []}
  assert len(found["queries"]) > 1
