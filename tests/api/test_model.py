"""`vixml_jax.Model`: predictions, metrics, new labels, and copies that stand alone."""

import json
import shutil

import numpy as np
import pytest

from tests.helpers.miniature import read_lines
import vixml_jax


@pytest.fixture
def model(trained, tmp_path):
  """A model in a copy of the workdir, which the test may change."""
  return vixml_jax.load(shutil.copytree(trained.model.workdir, tmp_path / "run"))


def test_repr_is_one_line(trained):
  assert repr(trained.model) == f"Model('{trained.folder}/run', labels=24, ranking='plain')"


def test_predictions_are_the_labels_of_highest_cosine(trained):
  titles = ["arrow circle", "sun"]
  index = trained.model._predictor.index
  scores = trained.model.encode(titles) @ np.asarray(index.embeddings).T
  for row, found in zip(scores, trained.model.predict(titles, k=4), strict=True):
    assert [label.id for label in found] == np.argsort(-row)[:4].tolist()


@pytest.mark.parametrize("ranking,prefix", [(None, ""), ("retrieval_augmented", "RA/")])
def test_evaluating_the_test_queries_gives_the_metrics_of_the_run(trained, ranking, prefix):
  found = trained.model.evaluate(trained.dataset, ranking=ranking)
  assert {f"{name}@{k}" for name in ("P", "PSP", "nDCG") for k in (1, 3, 5)} < set(found)
  assert found == pytest.approx({name: trained.model.metrics[f"{prefix}{name}"] for name in found})


def test_the_ranking_of_a_call_is_that_of_a_model_that_was_loaded_with_it(trained):
  blend = vixml_jax.load(trained.model.workdir, ranking="blend")
  queries = ["arrow circle", "sun"]
  assert trained.model.predict(queries, k=3, ranking="blend") == blend.predict(queries, k=3)
  assert blend.predict(queries, k=3, ranking="plain") == trained.model.predict(queries, k=3)
  with pytest.raises(vixml_jax.InputError, match="ranking='best' is not known"):
    trained.model.predict(queries, ranking="best")


def test_metrics_of_given_queries_are_those_counted_by_hand(trained, monkeypatch):
  monkeypatch.setattr("vixml_jax.api.scoring._QUERIES_AT_ONCE", 3)
  records = read_lines(trained.dataset.raw_dir / "tst.json.gz")[:8]
  titles, labels = (
    [record["title"] for record in records],
    [[f"label/{i}" for i in record["target_ind"]] for record in records],
  )
  found = trained.model.evaluate(titles, labels, ks=(2,), recall_ks=(4,))
  answers = trained.model.predict(titles, k=4)
  hits = [[label.label in right for label in row] for row, right in zip(answers, labels, strict=True)]
  assert found["P@2"] == pytest.approx(100 * np.mean([row[:2] for row in hits]))
  recalls = [sum(row) / len(right) for row, right in zip(hits, labels, strict=True)]
  assert found["R@4"] == pytest.approx(100 * np.mean(recalls))


@pytest.mark.parametrize(
  "queries,labels,message",
  [
    (["sun", "cloud"], [["label/1"], ["label/2", "label/99"]], "query 1: the model has no label 'label/99'"),
    (["sun", 5], [["label/1"], ["label/1"]], "query 1: must be a text"),
    (["sun"], None, "one list of uids for each of the 1 queries"),
    (["sun"], [["label/1"], []], "one list of uids for each of the 1 queries"),
    ([], [], "there are none to evaluate"),
  ],
)
def test_wrong_labeled_queries_are_named(trained, queries, labels, message):
  with pytest.raises(vixml_jax.InputError, match=message):
    trained.model.evaluate(queries, labels)


def test_a_data_set_has_its_own_labels(trained):
  with pytest.raises(vixml_jax.InputError, match="must not be given with a data set"):
    trained.model.evaluate(trained.dataset, [["label/1"]])


def test_labels_are_added_replaced_and_deleted_in_the_workdir(model):
  model.add_labels([{"uid": "otter", "title": "horse fish", "positives": ["brown horse fish"]}])
  for each in (model, vixml_jax.load(model.workdir)):
    assert each.num_labels == 25
    assert each.predict(["brown horse fish"], k=1, ranking="retrieval_augmented")[0][0].label == "otter"
    for ranking in ("plain", "blend"):
      assert "otter" in {label.label for label in each.predict(["brown horse fish"], k=25, ranking=ranking)[0]}
  with pytest.raises(vixml_jax.InputError, match="label 0: uid 'otter' belongs to a label .* or replace=True"):
    model.add_labels([{"uid": "otter", "title": "sea otter"}])
  model.add_labels([{"uid": "otter", "title": "cake cup"}], replace=True)
  assert model.num_labels == 25
  assert [label.text for label in model.predict(["horse"], k=25)[0] if label.label == "otter"] == ["cake cup"]
  model.delete_labels(["otter", "label/3"])
  assert model.num_labels == vixml_jax.load(model.workdir).num_labels == 23
  with pytest.raises(vixml_jax.InputError, match="uid 0: label 'otter' was deleted"):
    model.delete_labels(["otter"])
  with pytest.raises(vixml_jax.InputError, match="put a single one into brackets"):
    model.delete_labels("label/1")


def test_a_wrong_label_is_named_and_changes_nothing(model):
  with pytest.raises(vixml_jax.InputError, match="label 1: has no 'title'"):
    model.add_labels([{"uid": "a", "title": "a"}, {"uid": "b"}])
  with pytest.raises(vixml_jax.InputError, match="label 1: uid 'a' is also that of label 0"):
    model.add_labels([{"uid": "a", "title": "a"}, {"uid": "a", "title": "b"}])
  assert model.num_labels == vixml_jax.load(model.workdir).num_labels == 24


def test_a_saved_model_answers_alone_and_has_no_training_state(trained, model, tmp_path):
  model.delete_labels(["label/3"])
  wanted = {ranking: model.predict(["sun", "arrow"], k=5, ranking=ranking) for ranking in ("plain", "blend")}
  saved = model.save(tmp_path / "saved")
  model.workdir.rename(tmp_path / "gone")
  assert {path.name for path in saved.iterdir()} == {
    "checkpoints",
    "config.json",
    "evaluation.json",
    "final_metrics.json",
    "index",
    "inference.json",
    "report.html",
    "tokenizer",
  }
  (step,) = (saved / "checkpoints").iterdir()
  assert {path.name for path in step.iterdir() if path.is_dir()} == {"model", "meta"}
  copy = vixml_jax.load(saved)
  assert {ranking: copy.predict(["sun", "arrow"], k=5, ranking=ranking) for ranking in wanted} == wanted
  assert copy.metrics == trained.model.metrics and copy.report.exists()
  again = vixml_jax.load(copy.save(tmp_path / "again"))
  assert again.predict(["sun", "arrow"], k=5) == wanted["plain"]
  with pytest.raises(vixml_jax.InputError, match="saved: exists; give the path of a new folder"):
    copy.save(saved)


def test_a_saved_model_is_not_trained_further(trained, tmp_path):
  saved = trained.model.save(tmp_path / "saved")
  with pytest.raises(vixml_jax.InputError, match="saved: was saved for inference only"):
    vixml_jax.train(trained.dataset, trained.config, workdir=saved, train__epochs=3)


def test_missing_metrics_are_an_error(model):
  (model.workdir / "final_metrics.json").unlink()
  with pytest.raises(vixml_jax.InputError, match=r"final_metrics.json: cannot be read .*vixml_jax.evaluate"):
    _ = model.metrics


def test_loading_prints_nothing(trained, capfd):
  vixml_jax.load(trained.model.workdir)
  assert capfd.readouterr() == ("", "")


def test_metrics_are_those_of_the_file(trained):
  assert trained.model.metrics == json.loads((trained.model.workdir / "final_metrics.json").read_text())
