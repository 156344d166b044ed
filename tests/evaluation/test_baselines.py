"""Baselines: their metrics are those of plain loops, of napkinXC and of an untrained run; they are computed once."""

import json

import napkinxc.metrics
import napkinxc.models
import numpy as np
import pytest
import scipy.sparse

from tests.helpers.miniature_runs import miniature_config
from vixml_jax.errors import InputError
from vixml_jax.evaluation import baseline_rows as rows_module
from vixml_jax.evaluation import baselines, tuning
from vixml_jax.evaluation.baselines import BaselineTask
from vixml_jax.evaluation.blend_fitting import CorpusWords
from vixml_jax.evaluation.evaluate_model import evaluation_config, retrieval_settings
from vixml_jax.evaluation.label_trees import rank_by_label_trees
from vixml_jax.evaluation.metrics import evaluate
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.ragged import Ragged
from vixml_jax.run.pretrained import trainable_params
from vixml_jax.run.setup import set_up_run


class Case:
  """A miniature without training, its set-up and the task of its baselines."""

  def __init__(self, folder):
    self.folder = folder
    self.config = miniature_config(folder, num_train=160)
    self.config.train.epochs, self.config.dataset.validation_fraction = 0, 0.3
    self.config.eval.update(dict(blend=False, retrieval_choose=True, baselines=()))
    self.final = train_and_evaluate(self.config.copy_and_resolve_references(), folder / "run")
    self.config.method = "ngame"
    self.setup = set_up_run(self.config, folder / "ngame", extract=False)
    data, wanted = self.setup.data, self.config.eval
    propensity = data.inverse_propensity(0.55, 1.5)
    self.task = BaselineTask(data, propensity, evaluation_config(wanted), retrieval_settings(wanted))
    self.words = CorpusWords.read(data.corpus, data.known)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  return Case(tmp_path_factory.mktemp("baselines"))


def test_tfidf_is_retrieval_augmentation_over_word_vectors(case, monkeypatch):
  chosen, real = [], tuning.choose
  monkeypatch.setattr(tuning, "choose", lambda *args, **kwargs: chosen.append(real(*args, **kwargs)) or chosen[-1])
  ((name, found),) = baselines.tfidf(case.task, case.words).items()
  assert name == "TF-IDF labels + neighbors"
  ((best, tried),) = chosen
  assert len(tried) == len(tuning.LAMBDAS) * len(tuning.TEMPERATURES)
  corpus, hits, words = case.setup.data.corpus, case.task.retrieval, case.words
  by_label, by_query = ((words.test(corpus) @ part.T).toarray() for part in (words.labels, words.train))
  ids = np.full((len(by_label), len(by_label[0]) + 100), -1)
  for row, (labels, queries) in enumerate(zip(by_label, by_query, strict=True)):
    for scores, count in ((labels, hits.hits), (queries, hits.num_query_hits)):
      scores[np.argsort(-scores, kind="stable")[count:]] = 0
    joined = np.concatenate([labels, queries]).astype(np.float64)
    mass = np.where(joined > 0, np.exp((joined - joined.max()) / best.temperature), 0)
    mass /= max(mass.sum(), 1e-300)
    total = best.lambda_ * mass[: len(labels)]
    for query, share in enumerate(mass[len(labels) :]):
      total[corpus.train_labels[query]] += (1 - best.lambda_) * share
    total[corpus.test_filter[row]] = 0
    order = np.lexsort((np.arange(len(total)), -total.astype(np.float32)))
    ids[row, : len(order)] = np.where(total[order] > 0, order, -1)
  expected = evaluate(ids, corpus.test_labels, case.task.inverse_propensity)
  for metric in ("P@1", "P@5", "PSP@5", "R@10", "R@100"):
    assert found[metric] == pytest.approx(expected[metric], abs=1e-4), metric


def test_the_untrained_encoder_has_the_metrics_of_a_run_without_training(case):
  encoder = case.setup.load_encoder()
  params = trainable_params(encoder.model, case.setup.mesh, case.config.seed, case.setup.weights_folder)
  found = baselines.untrained(case.task, encoder, params, "exact")
  config = case.config.copy_and_resolve_references()
  final = train_and_evaluate(config, case.folder / "ngame_run")
  for name, prefix in (("encoder before training", ""), ("encoder before training + retrieval", "RA/")):
    for metric in ("P@1", "P@5", "PSP@1", "R@100"):
      assert found[name][metric] == pytest.approx(final[f"{prefix}{metric}"], abs=1e-4), (name, metric)


def test_label_trees_have_the_precision_that_napkinxc_measures(case, tmp_path):
  ((name, found),) = baselines.plt(case.task, case.words).items()
  corpus = case.setup.data.corpus
  assert name == "napkinXC PLT"
  labeled = np.flatnonzero(corpus.train_labels.lengths)
  positives = [corpus.train_labels[row].tolist() for row in labeled.tolist()]
  sort = lambda matrix: (matrix := scipy.sparse.csr_matrix(matrix), matrix.sort_indices())[0]
  model = napkinxc.models.PLT(str(tmp_path / "plt"), seed=0)
  model.fit(sort(case.words.train[labeled]), positives)
  predicted = model.predict(sort(case.words.test(corpus)), top_k=24)
  excluded = [set(corpus.test_filter[row].tolist()) for row in range(len(predicted))]
  kept = [[label for label in row if label not in out] for row, out in zip(predicted, excluded, strict=True)]
  truth = [corpus.test_labels[row].tolist() for row in range(len(predicted))]
  assert found["P@1"] == pytest.approx(100 * napkinxc.metrics.precision_at_k(truth, kept, k=1)[0], abs=1e-4)


def test_label_trees_take_labels_in_any_order(case):
  labels = case.setup.data.corpus.train_labels
  reversed_rows = Ragged.from_rows([labels[row][::-1].tolist() for row in range(len(labels))])
  assert (labels.lengths > 1).any()
  labeled = np.flatnonzero(labels.lengths)
  train, test = case.words.train[labeled], case.words.test(case.setup.data.corpus)
  first, second = (rank_by_label_trees(train, rows.take(labeled), test, 24) for rows in (labels, reversed_rows))
  # Threads of napkinXC share one random generator, so that two runs agree only where scores differ clearly.
  assert np.mean(first[:, :3] == second[:, :3]) > 0.9
  assert all(sorted(row) == list(range(24)) for row in second.tolist())


@pytest.mark.parametrize(
  "fault, reason",
  [
    ("os.kill(os.getpid(), signal.SIGKILL)", "it was ended by SIGKILL"),
    ("os._exit(3)", "it ended with status 3"),
    ("raise MemoryError('no more')", "it failed with 'MemoryError: no more'"),
  ],
)
def test_label_trees_that_fail_have_no_row(case, tmp_path, monkeypatch, caplog, fault, reason):
  _replace_napkinxc(tmp_path, monkeypatch, fault)
  with caplog.at_level("WARNING"):
    assert baselines.plt(case.task, case.words) == {}
  assert [record.getMessage() for record in caplog.records] == [
    f"no row for napkinXC's label trees (eval.baselines=plt): they run in their own process; {reason}"
  ]


def test_an_evaluation_outlives_label_trees_that_crash(case, tmp_path, monkeypatch, caplog):
  _replace_napkinxc(tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGSEGV)")
  config = case.config.copy_and_resolve_references()
  config.dataset.data_dir, config.eval.baselines = str(tmp_path / "data"), ("plt", "tfidf")
  with caplog.at_level("WARNING"):
    train_and_evaluate(config, tmp_path / "run")
  assert "it was ended by SIGSEGV" in caplog.text
  assert [*json.loads((tmp_path / "run" / "evaluation.json").read_text())["baselines"]] == ["TF-IDF labels + neighbors"]
  assert [path.name.split("-")[0] for path in (tmp_path / "data" / "baselines").iterdir()] == ["tfidf"]


def _replace_napkinxc(folder, monkeypatch, fault):
  """Lets other processes find a napkinXC that does this when trees are trained; this one has imported the real one."""
  (folder / "napkinxc").mkdir()
  (folder / "napkinxc" / "__init__.py").touch()
  (folder / "napkinxc" / "models.py").write_text(f"import os, signal\ndef PLT(*_, **__):\n  {fault}\n")
  monkeypatch.syspath_prepend(folder)


def test_rows_are_printed_stored_and_not_computed_again(case, tmp_path, capsys, monkeypatch):
  config = case.config.copy_and_resolve_references()
  config.dataset.data_dir, config.eval.baselines = str(tmp_path / "data"), ("tfidf", "untrained")
  config.baselines = dict(stated={"P@1": 12.5})
  train_and_evaluate(config.copy_and_resolve_references(), tmp_path / "one", print)
  printed = capsys.readouterr().out
  # A run without training is the baseline "untrained" itself.
  assert "TF-IDF labels + neighbors" in printed and "encoder before training" not in printed and "stated" in printed
  evaluation = json.loads((tmp_path / "one" / "evaluation.json").read_text())
  assert [*evaluation["baselines"]] == ["TF-IDF labels + neighbors", "stated"]
  assert "TF-IDF labels + neighbors" in (tmp_path / "one" / "report.html").read_text()
  monkeypatch.setattr(rows_module, "tfidf", None)  # Anything that computes again fails.
  train_and_evaluate(config.copy_and_resolve_references(), tmp_path / "two")
  assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["baselines"] == evaluation["baselines"]
  (stored,) = (tmp_path / "data" / "baselines").iterdir()
  stored.write_text("{")
  with pytest.raises(InputError, match=f"{stored}.*delete it to have it computed again"):
    train_and_evaluate(config.copy_and_resolve_references(), tmp_path / "three")


def test_without_napkinxc_the_label_trees_are_refused_before_any_work(case, tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "napkinxc.models", None)
  config = case.config.copy_and_resolve_references()
  config.eval.baselines = ("plt",)
  with pytest.raises(InputError, match=r"the baseline plt needs the package napkinxc.*'vixml-jax\[baselines\]'"):
    train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
