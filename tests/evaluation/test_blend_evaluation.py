"""The blend in an evaluation: nothing of held-out queries leaks into its fit, its row is that of its probabilities."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests.helpers.blend_cases import NUM_LABELS
from tests.helpers.miniature_runs import miniature_config
from vixml_jax import experiment
from vixml_jax.blend.lexical import NUM_COLUMNS
from vixml_jax.blend.ranking import ScoredCandidates
from vixml_jax.errors import InputError
from vixml_jax.evaluation import blend_fitting, evaluate_model
from vixml_jax.evaluation.blend_row import TAILS, BlendCounts
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.ragged import Ragged
from vixml_jax.run import configuration


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Workdir and final metrics of a run with the blend."""
  folder = tmp_path_factory.mktemp("blend")
  config = miniature_config(folder, num_train=160)
  config.train.epochs, config.dataset.validation_fraction = 1, 0.3
  config.eval.update(dict(blend=True, retrieval_choose=True, classifier_share=0.05))
  final = train_and_evaluate(config, folder / "run")
  return folder / "run", final


def test_all_outputs_have_the_row_the_dial_and_the_calibration(trained, capsys):
  workdir, final = trained
  names = [name for name in final if "@" in name and "/" not in name]
  assert names and all(0 <= final[f"blend/{name}"] <= 100 for name in names) and 0 <= final["blend/ECE"] <= 100
  evaluation = json.loads((workdir / "evaluation.json").read_text())
  assert evaluation["intervals_95"].keys() == evaluation["by_label_frequency"].keys() == {"plain", "augmented", "blend"}
  dial = evaluation["blend"]["dial"]
  assert [point["tail"] for point in dial] == list(TAILS)
  assert dial[0]["P@1"] == pytest.approx(final["blend/P@1"])
  assert dial[0]["PSP@1"] == pytest.approx(final["blend/PSP@1"])
  assert evaluation["blend"]["ECE"] == final["blend/ECE"] and evaluation["blend"]["reliability"]
  assert evaluation["baselines"]["classifiers of labels"].keys() == {*names}
  page = (workdir / "report.html").read_text()
  assert "The dial" in page and "reliability" in page
  again = evaluate_workdir(configuration.read(workdir / "config.json"), workdir, print)
  assert {name: again[name] for name in again if name.startswith("blend/")} == {
    name: final[name] for name in final if name.startswith("blend/")
  }
  printed = capsys.readouterr().out
  assert (
    "\nblend " in printed
    and "\nclassifiers of labels " in printed
    and "expected calibration error" in printed
    and "PSP@1" in printed
  )


def test_the_fit_sees_no_held_out_query(trained, monkeypatch):
  """With the labels of the held-out queries replaced, the features of the fit are the same: only their hits differ."""
  workdir, _ = trained
  seen, real = [], blend_fitting.BlendModel.fit
  monkeypatch.setattr(
    blend_fitting.BlendModel, "fit", lambda features, hits: seen.append((features, hits)) or real(features, hits)
  )

  evaluate_workdir(configuration.read(workdir / "config.json"), workdir)
  real_model = evaluate_model.evaluate_model

  def with_other_labels(config, data, encoder, model):
    labels = data.corpus.train_labels
    held_out = np.isin(labels.row_ids(), data.validation_rows)
    values = np.where(held_out, (labels.values + 5) % data.num_labels, labels.values)
    corpus = dataclasses.replace(data.corpus, train_labels=Ragged(values, labels.offsets))
    return real_model(config, dataclasses.replace(data, corpus=corpus), encoder, model)

  monkeypatch.setattr("vixml_jax.experiment.evaluate_model", with_other_labels)
  evaluate_workdir(configuration.read(workdir / "config.json"), workdir)
  (features, hits), (others, other_hits) = seen
  np.testing.assert_array_equal(features, others)
  assert not np.array_equal(hits, other_hits)


@pytest.mark.parametrize("least,times", [(0.01, 2), (0.9, 1)])
def test_classifiers_of_the_test_know_the_held_out_queries_where_these_are_many(trained, monkeypatch, least, times):
  """The first ones, which the blend is fitted with, know none of them."""
  workdir, _ = trained
  seen, data = [], []
  real, real_setup = evaluate_model.fit_classifiers, experiment.set_up_run
  monkeypatch.setattr(evaluate_model, "LEAST_HELD_OUT_TO_FIT_AGAIN", least)
  monkeypatch.setattr(
    experiment, "set_up_run", lambda *args, **kwargs: data.append(real_setup(*args, **kwargs)) or data[-1]
  )
  monkeypatch.setattr(
    evaluate_model,
    "fit_classifiers",
    lambda rows, labels, *args, **kwargs: seen.append(labels) or real(rows, labels, *args, **kwargs),
  )
  evaluate_workdir(configuration.read(workdir / "config.json"), workdir)
  held_out, corpus = data[0].data.validation_rows, data[0].data.corpus
  assert len(seen) == times and not seen[0].lengths[held_out].any()
  if times == 2:
    np.testing.assert_array_equal(seen[1].values, corpus.train_labels.values)


def test_held_out_queries_have_no_words_in_the_index_or_the_weights(trained, monkeypatch):
  """Words that only a held-out query has keep the weight of unseen words."""
  workdir, _ = trained
  seen, real = [], blend_fitting.CorpusWords.read.__func__
  monkeypatch.setattr(
    blend_fitting.CorpusWords,
    "read",
    classmethod(lambda cls, corpus, known: seen.append((real(cls, corpus, known), known)) or seen[-1][0]),
  )
  evaluate_workdir(configuration.read(workdir / "config.json"), workdir)
  ((words, known),) = seen
  known_columns = np.unique(np.concatenate([words.labels.indices, words.train[np.flatnonzero(known)].indices]))
  only_held_out = np.setdiff1d(words.train.indices, known_columns)
  assert len(only_held_out) and len(np.unique(words.tfidf.idf[only_held_out])) == 1
  assert words.tfidf.idf[only_held_out].min() == words.tfidf.idf.max() and len(words.tfidf.idf) == NUM_COLUMNS
  index = words.index(Ragged.from_rows([[0]] * len(known)), None, known)
  assert set(np.unique(index.queries.postings.indices)) <= set(np.flatnonzero(known))
  assert index.frequencies[0] == known.sum()


def test_the_split_that_the_blend_is_fitted_on_has_no_row_for_it(trained, tmp_path):
  workdir, _ = trained
  shutil.copytree(workdir, tmp_path / "run")
  config = configuration.read(workdir / "config.json")
  config.eval.split = "validation"
  assert not [name for name in evaluate_workdir(config, tmp_path / "run") if name.startswith("blend/")]


def test_without_held_out_queries_there_is_one_line(trained):
  other = configuration.read(trained[0] / "config.json")
  other.dataset.validation_fraction, other.eval.retrieval_choose = 0.0, False
  with pytest.raises(InputError, match=r"config.eval.blend=True: needs held-out queries"):
    configuration.check(other)


def test_the_dial_of_blocks_is_that_of_all_queries():
  rng = np.random.default_rng(0)
  propensity = rng.uniform(1, 9, NUM_LABELS)
  candidates = Ragged.from_rows([np.sort(rng.choice(NUM_LABELS, 4, replace=False)) for _ in range(6)])
  scored = ScoredCandidates(candidates, rng.uniform(0, 1, 24).astype(np.float32))
  labels = Ragged.from_rows([rng.choice(NUM_LABELS, 8, replace=False) for _ in range(6)])
  whole, blocks = BlendCounts(propensity), BlendCounts(propensity)
  whole.add(scored, labels)
  for rows in (np.arange(2), np.arange(2, 6)):
    part = ScoredCandidates(candidates.take(rows), scored.probabilities[4 * rows[0] : 4 * rows[-1] + 4])
    blocks.add(part, labels.take(rows))
  one, other = whole.results({}), blocks.results({})
  assert jax.tree.map(pytest.approx, one.dial) == other.dial and one.ece == pytest.approx(other.ece)
  assert len({point["PSP@1"] for point in one.dial}) > 1
