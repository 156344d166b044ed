"""A request names its ranking; the default is the best one of the run's evaluation."""

import json
import shutil

import pytest

from tests.helpers.http_server import call, expected, labels_of, metric, predict, running
from vixml_jax.errors import InputError
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.rankings import RANKINGS
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.serving.engine import Engine, QueryRequest
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.rankings import Rankings, best_ranking


@pytest.fixture(scope="module")
def predictors(texts_only):
  return {name: load_predictor(texts_only.workdir, ranking=name) for name in RANKINGS}


@pytest.fixture(scope="module")
def server(predictors):
  with running(lambda: predictors["plain"]) as server:
    yield server


def test_a_request_gets_the_ranking_that_it_names(server, predictors, texts_only):
  queries = [{"title": query["title"], "deny": ["label/3"]} for query in texts_only.queries[:3]]
  answers = {}
  for name in RANKINGS:
    answers[name] = labels_of(predict(server, *queries, k=6, ranking=name))
    assert answers[name] == expected(predictors[name], queries, 6)
  assert labels_of(predict(server, *queries, k=6)) == answers["plain"]
  assert answers["plain"] != answers["blend"]
  health = call(server, "/healthz").json
  assert health["rankings"] == list(RANKINGS) and health["ranking"] == "plain"


def test_a_batch_may_mix_rankings_and_is_encoded_once(predictors, texts_only):
  metrics = Metrics()
  engine = Engine(lambda: Rankings.of(predictors["plain"]), Limits(batch=8, k=20), metrics)
  engine.start()
  predictor, names = predictors["plain"], ["blend", "plain", None, "retrieval_augmented", "blend"]
  queries = predictor.checked([query["title"] for query in texts_only.queries[:5]])
  tokens = predictor.encoder.tokenizer([query.text for query in queries])
  ks = (3, 7, 5, 20, 9)
  asked = [QueryRequest(queries[i], tokens[i], ks[i], ranking=names[i]) for i in range(5)]
  found = [[tuple(label[:3]) for label in outcome.labels] for outcome in engine.answer(asked)]
  assert found == [expected(predictors[name or "plain"], [queries[i]], ks[i])[0] for i, name in enumerate(names)]
  assert metrics.registry.get_sample_value("vixml_encode_seconds_count") == 1


def test_a_ranking_that_is_not_offered_is_refused(predictors):
  with running(lambda: predictors["plain"], rankings=["plain", "retrieval_augmented"]) as server:
    assert metric(server, "vixml_labels") == 24
    for ranking, message in (("blend", "it offers plain, retrieval_augmented"), ("best", "should be 'plain'")):
      reply = predict(server, {"title": "sun"}, ranking=ranking)
      assert reply.status == 422 and reply.json["error"]["field"] == "ranking"
      assert message in reply.json["error"]["message"]
    reply = predict(server, {"title": "sun"}, tail=0.5)
    assert "this server offers plain, retrieval_augmented" in reply.json["error"]["message"]


def test_the_default_is_the_ranking_of_highest_precision_in_the_evaluation(texts_only, tmp_path, monkeypatch):
  run = tmp_path / "run"
  shutil.copytree(texts_only.workdir, run)

  def best(values, **arguments):
    (run / "final_metrics.json").write_text(json.dumps(values))
    return best_ranking(run, **arguments)

  all_three = {"P@1": 40.0, "RA/P@1": 41.5, "blend/P@1": 41.5}
  chosen = best(all_three)  # The first of equals, which costs less.
  assert chosen.name == "retrieval_augmented"
  assert chosen.reason == (
    "highest P@1 on the test queries of the run (plain 40.00, retrieval_augmented 41.50, blend 41.50)"
  )
  assert best(all_three | {"blend/P@1": 42.0}).name == "blend"
  assert best(all_three, among=["plain", "blend"]).name == "blend"
  assert best({"train_seconds": 3}).name == "plain"
  assert best(all_three, among=["blend"]).reason == "no other ranking is offered"
  (run / "evaluation.json").write_text('{"split": "validation"}')
  assert "on the held-out queries" in best(all_three).reason
  (run / "final_metrics.json").unlink()
  assert best_ranking(run).name == "plain"
  monkeypatch.setattr("vixml_jax.serving.rankings.check_blend_libraries", _no_libraries)
  assert best(all_three | {"blend/P@1": 99.0}).name == "retrieval_augmented"
  with pytest.raises(InputError, match=r"index: has no ranking blend; choose others with --rankings"):
    best(all_three, among=["blend"])


def test_the_default_is_no_blend_where_fewer_dimensions_are_searched(texts_only, tmp_path, monkeypatch):
  run = tmp_path / "run"
  shutil.copytree(texts_only.workdir, run)
  (run / "final_metrics.json").write_text(json.dumps({"P@1": 41.5, "RA/P@1": 40.0, "blend/P@1": 42.0}))
  assert best_ranking(run).name == "blend"
  monkeypatch.setattr("vixml_jax.serving.rankings.check_blend_libraries", _no_libraries)  # They are not needed.
  chosen = best_ranking(run, dims=16)
  assert chosen.name == "plain" and "(plain 41.50, retrieval_augmented 40.00)" in chosen.reason
  predictor = load_predictor(run, ranking=chosen.name, dims=16)
  assert list(Rankings.of(predictor).predictors) == ["plain", "retrieval_augmented"]
  with pytest.raises(InputError, match=r"index: has no ranking blend for dims=16; choose others with --rankings"):
    best_ranking(run, among=["blend"], dims=16)


def test_an_index_without_blend_and_training_queries_offers_plain_only(texts_only, predictors, monkeypatch):
  monkeypatch.setattr(LabelIndex, "blend", None)
  monkeypatch.setattr(LabelIndex, "retrieval", None)
  assert list(Rankings.of(predictors["plain"]).predictors) == ["plain"]


def test_settings_of_the_command_line_hold_for_every_ranking(predictors):
  rankings = Rankings.of(predictors["plain"], tail=0.3, min_probability=0.1, retrieval_lambda=0.25)
  assert (rankings.predictors["blend"].blend.tail, rankings.predictors["blend"].blend.min_probability) == (0.3, 0.1)
  assert rankings.predictors["retrieval_augmented"].retrieval.lambda_ == 0.25


def _no_libraries():
  raise InputError("lightgbm cannot be imported")
