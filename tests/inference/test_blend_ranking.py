"""The blend of an index ranks as the evaluation did, with its dial, filters, new labels and deleted ones."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest

from tests.helpers.http_server import expected, labels_of, predict, running
from tests.helpers.miniature_runs import run_commands
from vixml_jax.blend.lexical import TfIdf, count_ngrams
from vixml_jax.errors import InputError
from vixml_jax.inference.blend_ranking import Dials
from vixml_jax.inference.label_files import label_format
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.new_labels import add_labels, embed_labels
from vixml_jax.search.label_index import LabelIndex


@pytest.fixture(scope="module")
def blend(texts_only):
  return load_predictor(texts_only.workdir, ranking="blend")


@pytest.fixture
def copy(texts_only, tmp_path):
  """Copy of the workdir whose index the test may edit."""
  return shutil.copytree(texts_only.workdir, tmp_path / "run")


def found_by(predictor, queries, k=24):
  """Returns label ids and scores of each query."""
  rows = predictor.predict(queries, k)
  return [[label.id for label in row] for row in rows], [[label.score for label in row] for row in rows]


def test_the_test_split_gives_the_metrics_that_training_printed(texts_only, blend):
  ids, probabilities = found_by(blend, texts_only.queries, k=3)
  positives = [set(row) for row in texts_only.positives]
  first = [row[0] in known for row, known in zip(ids, positives, strict=True)]
  assert 100 * np.mean(first) == pytest.approx(texts_only.final["blend/P@1"])
  hits = [len(set(row) & known) for row, known in zip(ids, positives, strict=True)]
  assert 100 * np.mean(hits) / 3 == pytest.approx(texts_only.final["blend/P@3"])
  for row in probabilities:
    assert row == sorted(row, reverse=True) and row[-1] >= 0 and row[0] <= 1


def test_the_dial_ranks_by_probability_times_inverse_propensity(texts_only, blend):
  queries = [query["title"] for query in texts_only.queries]
  probability = [dict(zip(*row, strict=True)) for row in zip(*found_by(blend, queries), strict=True)]
  for tail in (0.3, 1.0):
    dialed = dataclasses.replace(blend, blend=dataclasses.replace(blend.blend, tail=tail))
    for ids, scores, known in zip(*found_by(dialed, queries), probability, strict=True):
      assert scores == [known[label] for label in ids]
      gains = np.array(scores, np.float64) * blend.blend.inverse_propensity[ids] ** tail
      assert len(ids) == len(known) and np.all(np.diff(gains) <= 0)


def test_labels_below_the_least_probability_are_left_out(texts_only, blend):
  queries = [query["title"] for query in texts_only.queries]
  least = float(np.median([score for row in found_by(blend, queries)[1] for score in row]))
  loaded = load_predictor(texts_only.workdir, ranking="blend", min_probability=least)
  for all_scores, kept in zip(found_by(blend, queries)[1], found_by(loaded, queries)[1], strict=True):
    assert kept == [score for score in all_scores if score >= least]


def test_each_query_may_have_its_own_dial(texts_only, blend):
  texts = [query["title"] for query in texts_only.queries[:4]]
  embeddings = blend.encode(texts)
  tails, least = np.array([0.0, 1.0, 0.5, 0.0]), np.array([0.0, 0.0, 0.01, 0.02])
  together = blend.search(embeddings, 24, texts=texts, dials=Dials(tails, least))
  for row in range(4):
    dials = Dials(tails[[row]], least[[row]])
    alone = blend.search(embeddings[[row]], 24, texts=texts[row : row + 1], dials=dials)
    np.testing.assert_array_equal(together[1][row], alone[1][0])
  with pytest.raises(ValueError, match="needs the texts"):
    blend.search(embeddings, 24)


def test_filters_hold(texts_only, blend):
  uids = [label["uid"] for label in texts_only.labels]
  queries = [
    {"title": "arrow up", "allow": uids[:5]},
    {"title": "arrow up", "deny": uids[:20]},
    {"title": "arrow up", "allow": []},
  ]
  allowed, denied, nothing = blend.predict(queries, 24)
  assert {label.label for label in allowed} == set(uids[:5])  # The search by prototype finds all of a few labels.
  assert denied and not {label.label for label in denied} & set(uids[:20])
  assert nothing == []


def test_new_labels_are_found_by_their_words_and_deleted_ones_never(copy):
  predictor = load_predictor(copy, ranking="blend")
  index, idf = predictor.index, np.asarray(predictor.index.blend.idf)
  records = [
    {"uid": "new/0", "title": "zebra quagga", "positives": ["zebra crossing", "striped quagga"]},
    {"uid": "new/1", "title": "zebra okapi"},
  ]
  labels = [label_format(predictor.encoder.config).parse(record, "label") for record in records]
  gone = int(found_by(predictor, ["arrow up"], 1)[0][0][0])
  add_labels(index, labels, embed_labels(predictor, labels), np.array([gone]))
  opened = LabelIndex.open(copy / "index", checkpoint=None)
  for vectors, texts, first in (
    (opened.blend.words.labels, ["zebra quagga", "zebra okapi"], index.num_labels),
    (opened.blend.words.queries, ["zebra crossing", "striped quagga"], len(index.query_labels)),
  ):
    assert vectors.shape[0] == first + 2
    expected = TfIdf(idf).vectors(count_ngrams([texts]))
    np.testing.assert_array_equal(
      vectors[first:].toarray()[:, expected.indices], expected.toarray()[:, expected.indices]
    )
  edited = load_predictor(copy, ranking="blend")
  ids, _ = found_by(edited, ["zebra quagga", "arrow up"], edited.index.num_live)
  assert {index.num_labels, index.num_labels + 1} <= set(ids[0]) and gone not in ids[0] + ids[1]
  assert edited.blend.index.frequencies[[index.num_labels, index.num_labels + 1]].tolist() == [2, 0]
  deleted = edited.index.delete([index.num_labels])
  again = found_by(edited.with_index(deleted), ["zebra quagga"], deleted.num_live)[0][0]
  assert index.num_labels not in again and index.num_labels + 1 in again
  assert deleted.blend.words.labels.shape == opened.blend.words.labels.shape
  with pytest.raises(ValueError, match="needs the words"):
    deleted.add(np.ones((1, deleted.dim)), ["x"], ["new/2"], np.zeros(1, np.int32))


def test_a_damaged_model_is_refused(copy):
  (path,) = (copy / "index").glob("*/blend_model.txt")
  path.write_bytes(path.read_bytes().replace(b"tree", b"true", 1))
  with pytest.raises(InputError, match=r"blend_model.txt: is damaged \(its sha256 differs"):
    load_predictor(copy, ranking="blend")


@pytest.mark.parametrize(
  "given,message",
  [
    (dict(ranking="best"), "ranking='best' is not known: use one of plain, retrieval_augmented, blend"),
    (dict(ranking="blend", tail=1.5), "tail is 1.5: it must be between 0 and 1"),
    (dict(ranking="blend", tail=float("nan")), "tail is nan"),
    (dict(ranking="blend", min_probability=-1), "min_probability is -1: it must be between 0 and 1"),
    (dict(tail=0.5), "tail=0.5: only the ranking blend has it, and the ranking is plain"),
    (dict(ranking="plain", retrieval_augmented=True), "ranking=plain and retrieval_augmented exclude each other"),
  ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(tmp_path, given, message):
  with pytest.raises(InputError, match=message):
    load_predictor(tmp_path / "missing", **given)


def test_an_index_without_a_blend_says_how_to_write_one(texts_only, monkeypatch):
  monkeypatch.setattr(LabelIndex, "blend", None)
  with pytest.raises(InputError, match=r"index: has no blend; where the data set is, run python -m vixml_jax.evaluate"):
    load_predictor(texts_only.workdir, ranking="blend")


def test_the_command_ranks_by_the_blend(texts_only, blend, tmp_path):
  (tmp_path / "q.jsonl").write_text('{"title": "arrow up"}\n{"title": "cloud"}\n')
  flags = [
    f"--workdir={texts_only.workdir}",
    f"--queries={tmp_path}/q.jsonl",
    f"--output={tmp_path}/top.jsonl",
    "--k=5",
  ]
  command = ["predict", *flags, "--ranking=blend", "--tail=0.4", "--min_probability=0.01"]
  status, _, stderr = run_commands({"blend": command}, tmp_path)["blend"]
  assert status == 0, stderr
  dialed = dataclasses.replace(blend, blend=dataclasses.replace(blend.blend, tail=0.4, min_probability=0.01))
  lines = [json.loads(line)["predictions"] for line in (tmp_path / "top.jsonl").read_text().splitlines()]
  for line, row in zip(lines, dialed.predict(["arrow up", "cloud"], 5), strict=True):
    assert [label["id"] for label in line] == [label.id for label in row]
    np.testing.assert_allclose([label["score"] for label in line], [label.score for label in row], atol=1e-6)


def test_the_server_ranks_by_the_blend_with_the_dial_of_each_request(texts_only, blend):
  with running(functools.partial(load_predictor, texts_only.workdir, ranking="blend")) as server:
    for tail, least in ((0.0, 0.0), (0.7, 0.01)):
      found = labels_of(predict(server, {"title": "arrow up"}, k=5, tail=tail, min_probability=least))
      dialed = dataclasses.replace(blend, blend=dataclasses.replace(blend.blend, tail=tail, min_probability=least))
      assert found == expected(dialed, ["arrow up"], 5)
    reply = predict(server, {"title": "arrow up"}, tail=2.0)
    assert reply.status == 422 and reply.json["error"]["field"] == "tail"


def test_the_server_refuses_the_dial_of_the_blend_with_another_ranking(texts_only):
  with running(functools.partial(load_predictor, texts_only.workdir)) as server:
    reply = predict(server, {"title": "arrow up"}, min_probability=0.5)
  assert reply.status == 422 and reply.json["error"]["field"] == "min_probability"
  assert "the ranking is plain; set ranking to blend" in reply.json["error"]["message"]
