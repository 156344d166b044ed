"""Runs from start to end on a miniature: outputs, what is computed once, evaluation again, refused changes."""

import contextlib
import html
import io
import json
import math
from pathlib import Path
import shutil
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np
import pytest
import torch
import transformers

from tests.helpers.miniature import read_lines, write_raw_folder
from tests.helpers.miniature_runs import miniature_config, run_commands
import vixml_jax
from vixml_jax.ahead_of_time.description import describe
from vixml_jax.ahead_of_time.description_text import description_json, description_text
from vixml_jax.ahead_of_time.sizes import data_size
from vixml_jax.datasets.raw import SPLITS
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.files import sha256_of_file
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.row_files import RowFiles
from vixml_jax.run import configuration, setup
from vixml_jax.run.provenance import read_starts
from vixml_jax.verification import verify_workdir


class FinishedRun(NamedTuple):
  """A finished run, and what was counted meanwhile."""

  config: ConfigDict
  workdir: Path
  final: dict[str, Any]
  shown: str
  encoded: list[str]
  tokenizers: list[str]


@contextlib.contextmanager
def count_encodings():
  """Yields a list that grows by a name for each pass of the encoder over a set of items."""
  names, stored = [], ItemEncoder._stored

  def counted(self, params, items, name, **how):
    names.append(name)
    return stored(self, params, items, name, **how)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ItemEncoder, "_stored", counted)
    yield names


@contextlib.contextmanager
def count_tokenizers():
  """Yields a list that grows by a path for each tokenizer that is loaded."""
  paths, load = [], Tokenizer.__init__

  def counted(self, path, *arguments):
    paths.append(str(path))
    load(self, path, *arguments)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Tokenizer, "__init__", counted)
    yield paths


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of the miniature that has learned; tests that write to its workdir copy it first."""
  folder = tmp_path_factory.mktemp("experiment")
  config = miniature_config(folder)
  config.train.update(dict(epochs=6, learning_rate=5e-3, new_learning_rate=5e-3, free_vector_learning_rate=3e-2))
  shown, printed = [], io.StringIO()
  with contextlib.redirect_stdout(printed), count_encodings() as encoded, count_tokenizers() as tokenizers:
    final = train_and_evaluate(config, folder / "run", shown.append)
  assert not printed.getvalue()
  return FinishedRun(config, folder / "run", final, "\n".join(shown), list(encoded), list(tokenizers))


@pytest.fixture
def config(finished):
  """A copy of the config to change."""
  return finished.config.copy_and_resolve_references()


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of the finished workdir to change."""
  return shutil.copytree(finished.workdir, tmp_path / "run")


def test_a_run_learns(finished):
  lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()]
  assert set(lines[0]) == {"step", "epoch", "split", "values"}
  epochs = [line for line in lines if line["split"] == "epoch"]
  assert [line["epoch"] for line in epochs] == list(range(6))
  losses = [line["values"]["mean_loss"] for line in epochs]  # Mining makes the batches harder from epoch to epoch.
  assert min(losses) < 0.9 * losses[0]
  # The words of a query name its first label: a trained model finds it far more often than chance (1 in 24).
  assert finished.final["P@1"] > 40


def test_a_run_writes_all_outputs_and_shows_its_table(finished):
  written = json.loads((finished.workdir / "final_metrics.json").read_text())
  assert written == finished.final
  names = [f"{name}@{k}" for name in ("P", "PSP", "nDCG") for k in (1, 3, 5)] + ["R@10", "R@100"]
  for key in (*names, *(f"RA/{name}" for name in names), "train_seconds", "tokens_per_second"):
    assert math.isfinite(written[key]), key
  for name in ("config.json", "evaluation.json", "report.html", "checkpoints", "tensorboard", "index", "tokenizer"):
    assert (finished.workdir / name).exists(), name
  assert RowFiles(finished.workdir / "embeddings", "labels").shape == (24, 32)
  assert "P@1" in finished.shown and f"{finished.final['P@1']:.2f}" in finished.shown


def test_training_queries_are_encoded_at_the_start_and_once_after_the_last_step(finished):
  assert finished.encoded.count("training queries") == 2


def test_a_run_loads_one_tokenizer(finished):
  assert finished.tokenizers == [finished.config.encoder.pretrained]


def test_evaluating_again_encodes_training_queries_once_and_gives_the_same_numbers(finished, workdir):
  with count_encodings() as encoded:
    again = evaluate_workdir(configuration.read(workdir / "config.json"), workdir)
  assert encoded.count("training queries") == 1
  assert again == finished.final


def _files(folder):
  return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_verify_computes_equal_metrics_and_writes_nothing(finished):
  before = _files(finished.workdir)
  verification = verify_workdir(configuration.read(finished.workdir / "config.json"), finished.workdir, 0)
  assert verification.computed["P@1"] == finished.final["P@1"]
  assert verification.text() == f"{len(finished.final) - 2} metrics: {len(finished.final) - 2} equal"
  assert _files(finished.workdir) == before


def test_verify_says_by_how_much_metrics_differ_and_fails_beyond_the_tolerance(finished, workdir, tmp_path):
  stored = {name: value for name, value in finished.final.items() if name != "R@100"}
  stored |= {"P@1": stored["P@1"] + 0.005, "RA/P@3": stored["RA/P@3"] - 1}
  (workdir / "final_metrics.json").write_text(json.dumps(stored))
  evaluation = json.loads((workdir / "evaluation.json").read_text())
  evaluation["environment"]["packages"]["jax"] = "0.0.1"
  (workdir / "evaluation.json").write_text(json.dumps(evaluation))
  before = _files(workdir)
  shutil.copytree(workdir, tmp_path / "other", ignore=shutil.ignore_patterns("final_metrics.json"))
  evaluate = ["evaluate", f"--workdir={workdir}", "--verify"]
  commands = {
    "beyond": evaluate,
    "searched otherwise": [*evaluate, "--search=exact"],
    "never evaluated": ["evaluate", f"--workdir={tmp_path / 'other'}", "--verify"],
  }
  results = run_commands(commands, tmp_path)
  status, shown, said = results["beyond"]
  assert status == 1 and _files(workdir) == before
  rows = [line.split() for line in shown.splitlines()]
  assert rows[0] == ["metric", "stored", "computed", "difference"]
  assert {row[0]: row[3] for row in rows[1:4]} == {"P@1": "0.005", "RA/P@3": "1", "R@100": "inf"}
  assert any(line.startswith("not as before: jax: 0.0.1; now ") for line in shown.splitlines())
  number = len(finished.final) - 2
  assert shown.splitlines()[-1] == f"{number} metrics: {number - 3} equal, 1 within 0.01, 2 beyond it"
  assert said.splitlines()[-1].startswith(
    f"error: {workdir}/final_metrics.json: 2 metrics differ by more than --tolerance=0.01, most of all R@100; "
  )
  assert results["searched otherwise"][0] == 1
  assert "error: --search: cannot be used with --verify" in results["searched otherwise"][2]
  assert results["never evaluated"][0] == 1
  assert "final_metrics.json: cannot be read" in results["never evaluated"][2]


def test_provenance_of_a_run_is_in_its_workdir_its_report_and_its_description(finished, workdir):
  (trained, evaluated) = read_starts(finished.workdir), read_starts(workdir)
  assert trained == evaluated and len(trained) == 1
  (start,) = trained
  weights = Path(finished.config.encoder.pretrained) / "model.safetensors"
  assert start["weights_sha256"] == {"model.safetensors": sha256_of_file(weights)}
  page = (finished.workdir / "report.html").read_text()
  for value in (start["data_fingerprint"], start["weights_sha256"]["model.safetensors"], start["environment"]["host"]):
    assert value in html.unescape(page)
  config = configuration.read(workdir / "config.json")
  described = describe(config, data_size(config), workdir=workdir)
  assert f"  data: {start['data_fingerprint']}" in description_text(described).splitlines()
  assert description_json(described)["provenance"] == trained
  evaluate_workdir(config, workdir)
  assert [entry["times"] for entry in read_starts(workdir)] == [2]


def test_a_damaged_index_which_may_have_been_edited_is_kept_under_another_name(finished, workdir, caplog):
  (index,) = (workdir / "index").rglob("index.json")
  index.write_bytes(index.read_bytes()[:-2])
  damaged = {path.name: path.read_bytes() for path in index.parent.iterdir() if path.is_file()}
  evaluate_workdir(finished.config, workdir)
  assert f"is kept as {workdir}/index.damaged-1, and a new index is written" in caplog.text
  assert {name: (workdir / "index.damaged-1" / index.parent.name / name).read_bytes() for name in damaged} == damaged
  assert vixml_jax.load(workdir).predict(["a"], k=1)


def test_another_recipe_is_refused_in_a_used_workdir(finished, config):
  config.train.batch_size, config.dataset.raw_dir = 8, "absent"
  with pytest.raises(InputError, match="started with train.batch_size=16, not 8"):  # Before the data are read.
    train_and_evaluate(config, finished.workdir)


def test_a_run_on_changed_data_is_refused_before_frozen_weights_are_loaded(config, workdir, tmp_path, monkeypatch):
  config.dataset.raw_dir = str(write_raw_folder(tmp_path / "raw", seed=1))
  config.dataset.data_dir = str(tmp_path / "data")
  monkeypatch.setattr(setup, "frozen_params", lambda *_: pytest.fail("weights were loaded"))
  before = (workdir / "config.json").read_bytes()
  with pytest.raises(InputError, match="trained on other data than custom now contains; use another --workdir"):
    train_and_evaluate(config, workdir)
  assert (workdir / "config.json").read_bytes() == before


def test_without_epochs_prototypes_are_means_of_embeddings_and_centroids_of_the_pretrained_encoder(tmp_path, caplog):
  config = miniature_config(tmp_path, num_train=160)
  config.train.epochs, config.dataset.validation_fraction = 0, 0.3
  config.eval.update(dict(blend=True, retrieval_choose=True))
  workdir = tmp_path / "run"
  with caplog.at_level("INFO"), count_encodings() as encoded:
    final = train_and_evaluate(config, workdir)
  assert "a prototype is the mean of the label's embedding and its centroid" in caplog.text
  assert configuration.read(workdir / "config.json").method == "mean"
  assert sorted(encoded) == ["labels", "test queries", "training queries"]  # Each once.
  tokenizer = transformers.AutoTokenizer.from_pretrained(config.encoder.pretrained)
  model = transformers.AutoModel.from_pretrained(config.encoder.pretrained)

  def embed(split):
    records = read_lines(tmp_path / "raw" / SPLITS[split].rows)
    inputs = tokenizer(
      [record["title"] for record in records],
      padding=True,
      truncation=True,
      max_length=config.dataset.max_length,
      return_tensors="pt",
    )
    with torch.no_grad():
      hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy(), records

  (labels, _), (queries, records) = embed("labels"), embed("train")
  centroids = np.zeros_like(labels)
  for number in range(len(labels)):
    positives = [row for row, record in enumerate(records) if number in record["target_ind"]]
    if positives:
      mean = queries[positives].mean(0)
      centroids[number] = mean / np.linalg.norm(mean)
  expected = labels + centroids
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(RowFiles(workdir / "embeddings", "labels").load(), expected, atol=2e-6)
  assert 0 <= final["blend/P@1"] <= 100 and final["train_seconds"] == 0
  assert vixml_jax.load(workdir, ranking="blend").predict(["arrow up"], 3)
  again = train_and_evaluate(config, workdir)  # Starting the command again evaluates again, without any step.
  assert {key: again[key] for key in final} == final
