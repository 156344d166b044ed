"""Metrics of smaller vectors equal those of brute force over normalized prefixes; the command writes and shows them."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.helpers.miniature_runs import load_config, run_commands
from tests.helpers.search_cases import brute_force, unit
from vixml_jax.evaluation.evaluator import EvaluationQueries
from vixml_jax.evaluation.small_vectors import BYTES, chosen_dims, evaluate_small_vectors
from vixml_jax.experiment import evaluate_workdir
from vixml_jax.ragged import Ragged
from vixml_jax.run import configuration
from vixml_jax.search.prefixes import scaled_prefix


def test_precision_recall_and_bytes_equal_those_of_brute_force():
  labels, rng = unit(300, 0, 16), np.random.default_rng(0)
  positives = [rng.choice(300, 3, replace=False) for _ in range(20)]
  queries = np.stack([labels[row].sum(0) for row in positives]) + 0.3 * unit(20, 1, 16)
  filtered = [row[:1] if i % 2 else [] for i, row in enumerate(positives)]
  asked = EvaluationQueries(queries, Ragged.from_rows(positives), Ragged.from_rows(filtered))
  found = evaluate_small_vectors((16, 6), labels, asked, np.ones(300))
  assert list(found) == [f"dims{dims}/{dtype}" for dims in (16, 6) for dtype in ("float32", "int8", "bit")]
  permitted = np.asarray([~np.isin(np.arange(300), row) for row in filtered])
  for dims, sizes in ((16, (64, 24, 10)), (6, (24, 14, 9))):
    _, ids = brute_force(scaled_prefix(labels, dims), scaled_prefix(queries, dims), 100, permitted)
    hits = [np.isin(row, wanted) for row, wanted in zip(ids, positives, strict=True)]
    for dtype in ("float32", "int8"):
      values = found[f"dims{dims}/{dtype}"]
      assert values["P@1"] == pytest.approx(100 * np.mean([row[0] for row in hits]))
      assert values["R@100"] == pytest.approx(100 * np.mean([row.sum() / 3 for row in hits]), abs=1e-4)
    assert tuple(found[f"dims{dims}/{dtype}"][BYTES] for dtype in ("float32", "int8", "bit")) == sizes
  assert evaluate_small_vectors((), labels, asked, np.ones(300)) == {}


def test_evaluation_prints_writes_and_reports_smaller_vectors(texts_only, tmp_path, capsys):
  copy = shutil.copytree(texts_only.workdir, tmp_path / "run")
  config = configuration.read(copy / "config.json")
  config.dataset.update(dict(raw_dir=str(texts_only.raw), data_dir=str(texts_only.data)))
  config.encoder.pretrained = str(texts_only.encoder)
  config.eval.update(dict(retrieval_augmented=False, blend=False, baselines=(), small_vectors=(32, 8)))
  final = evaluate_workdir(config, copy, print)
  assert final["dims32/float32/P@1"] == final["dims32/int8/P@1"] == final["P@1"] == texts_only.final["P@1"]
  assert final["dims8/bit/bytes per label"] == 9
  shown = re.search(r"^dims8/int8 +([\d.]+) +([\d.]+) +16$", capsys.readouterr().out, re.MULTILINE)
  assert shown and float(shown[1]) == pytest.approx(final["dims8/int8/P@1"], abs=0.006)
  assert json.loads((copy / "final_metrics.json").read_text()) == final
  assert "Smaller vectors</h2>" in (copy / "report.html").read_text()


def test_the_prefixes_of_training_are_evaluated_by_default(texts_only, tmp_path, capsys):
  copy = shutil.copytree(texts_only.workdir, tmp_path / "run")
  config = configuration.read(copy / "config.json")
  config.dataset.update(dict(raw_dir=str(texts_only.raw), data_dir=str(texts_only.data)))
  config.encoder.pretrained = str(texts_only.encoder)
  default = tuple(load_config("custom").eval.small_vectors)
  config.eval.update(dict(retrieval_augmented=False, blend=False, baselines=(), small_vectors=default))
  config.train.matryoshka_dims = (32, 8)
  configuration.check(config)
  configuration.write(config, copy / "config.json")  # As if it had been trained so.
  final = evaluate_workdir(config, copy, print)
  assert {name.split("/")[0] for name in final if name.startswith("dims")} == {"dims32", "dims8"}
  assert len(re.findall(r"^dims", capsys.readouterr().out, re.MULTILINE)) == 6
  assert chosen_dims(default, ()) == chosen_dims((), (32, 8)) == ()


def test_the_command_refuses_more_dimensions_than_the_model_has(texts_only, tmp_path):
  command = ["evaluate", f"--workdir={texts_only.workdir}", "--small_vectors=64"]
  status, _, stderr = run_commands({"wide": command}, tmp_path)["wide"]
  assert status and stderr == ("error: config.eval.small_vectors=(64,): must be at most config.encoder.embed_dim=32\n")
