"""A study from start to end on a miniature: runs, resuming, shards, splits, and the numbers of its table."""

import json
import math
import shutil

import numpy as np
import pytest

from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import miniature_config, run_commands, shrink
from vixml_jax.errors import InputError
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.files import write_json
from vixml_jax.report.compare import paired_bootstrap
from vixml_jax.run.data import prepare_data
from vixml_jax.studies import comparison, grids, run_study
from vixml_jax.studies.comparison import compare_cells, comparison_table, write_comparison
from vixml_jax.studies.grids import STUDIES, Cell
from vixml_jax.studies.run_study import plan_study

HIGHER = Cell("rate=0.01", {"train.learning_rate": 0.01})


def tiny_config(folder, **changes):
  config = miniature_config(folder, **changes)
  config.train.epochs = 1
  config.dataset.validation_fraction = 0.3
  config.eval.update(dict(blend=False, baselines=(), retrieval_choose=False))
  return config


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  """Two cells with one seed, run by two shards on validation queries; nothing writes to it later but `test` does."""
  folder = tmp_path_factory.mktemp("study")
  config = tiny_config(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(STUDIES, "rates", lambda _: [HIGHER])
    runs = plan_study("rates", config, 1, "validation", folder / "out")
    run_study.run_study(runs, (0, 2))
    first = compare_cells(runs)
    run_study.run_study(runs, (1, 2))
    tests = plan_study("rates", config, 1, "test", folder / "out")
  return folder, config, runs, tests, first


def test_a_shard_trains_its_runs_and_the_table_has_what_is_finished(study):
  _, _, runs, _, first = study
  assert {result.cell for result in first} == {"as configured"}
  results = compare_cells(runs)
  assert {(result.cell, result.row) for result in results} == {
    (cell, row) for cell in ("as configured", "rate=0.01") for row in ("plain", "augmented")
  }


def test_differences_are_those_of_the_paired_bootstrap_on_the_stored_results(study):
  runs = study[2]
  base, other = (PerQuery.load(run.results).rows["plain"] for run in runs)
  (found,) = [result for result in compare_cells(runs) if (result.cell, result.row) == ("rate=0.01", "plain")]
  assert found.differences == paired_bootstrap(base, other)
  assert found.means["P@1"] == pytest.approx(other.mean()["P@1"])
  assert found.halves == {}


def test_seeds_that_hold_out_other_queries_are_compared_on_the_queries_of_each(study, tmp_path, monkeypatch):
  _, config, runs, *_ = study
  monkeypatch.setitem(STUDIES, "rates", lambda _: [HIGHER])
  both = plan_study("rates", config, 2, "validation", tmp_path)
  for run, done in zip(both, [*runs, *runs], strict=True):
    shutil.copytree(done.workdir, run.workdir)
    write_json(run.workdir / "study_run.json", run_study._recipe(run.config))
    if run.seed != runs[0].seed:  # As if this seed had held out fewer queries, and others.
      results = PerQuery.load(done.results)
      rows = {name: row.take(np.arange(3, len(row))) for name, row in results.rows.items()}
      PerQuery({**results.description, "queries": "others"}, rows).save(run.results)
  (found,) = [result for result in compare_cells(both) if (result.cell, result.row) == ("rate=0.01", "plain")]
  base, other = (PerQuery.load(run.results).rows["plain"] for run in runs)
  twice = [row.take(np.r_[np.arange(len(row)), np.arange(3, len(row))]) for row in (base, other)]
  assert found.seeds == (runs[0].seed, runs[0].seed + 1)
  assert found.differences == paired_bootstrap(*twice)


def test_what_is_finished_is_not_trained_again(study, monkeypatch):
  monkeypatch.setattr(run_study, "train_and_evaluate", None)
  monkeypatch.setattr(run_study, "evaluate_workdir", None)
  run_study.run_study(study[2])


def test_another_split_is_evaluated_without_training_and_both_remain(study, monkeypatch):
  _, _, runs, tests, _ = study
  monkeypatch.setattr(run_study, "train_and_evaluate", None)
  run_study.run_study(tests)
  assert all(run.finished for run in [*runs, *tests])
  splits = [PerQuery.load(run.results).description["split"] for run in (runs[0], tests[0])]
  assert splits == ["validation", "test"]


def test_a_folder_of_another_config_is_refused_before_anything_is_trained(study, monkeypatch):
  folder, config, *_ = study
  changed = type(config)(config.to_dict())
  changed.train.epochs = 2
  monkeypatch.setattr(run_study, "train_and_evaluate", None)
  monkeypatch.setitem(STUDIES, "rates", lambda _: [HIGHER])
  with pytest.raises(InputError, match=r"this run had train.epochs=1, not 2; use another --output"):
    run_study.run_study(plan_study("rates", changed, 1, "validation", folder / "out"))


def test_table_and_page_show_all_cells(study, tmp_path):
  results = compare_cells(study[2])
  write_comparison(tmp_path, "rates", "validation", results)
  page = (tmp_path / "study-validation.html").read_text("utf-8")
  assert page.count("rate=0.01") >= 2 and "plain: P@1" in page
  stored = json.loads((tmp_path / "study-validation.json").read_text("utf-8"))
  assert [result["cell"] for result in stored["results"]] == [result.cell for result in results]
  assert comparison_table(results).splitlines()[3].startswith("rate=0.01")


def test_means_over_seeds_have_the_interval_of_students_t():
  values = [60.0, 61.0, 63.5]
  mean, half = np.mean(values), comparison._half_width(values)
  # 4.303 is the 97.5 % quantile of Student's t with two degrees of freedom, from a printed table.
  assert half == pytest.approx(4.303 * np.std(values, ddof=1) / math.sqrt(3), rel=1e-3)
  assert mean - half < 60 < mean + half


def test_a_shard_out_of_range_is_named(tmp_path):
  command = ["study", "--study=seeds", "--config=configs/quickstart.py", f"--output={tmp_path}"]
  shards = ("2/2", "1", "-1/2", "a/b")
  results = run_commands({shard: [*command, f"--shard={shard}"] for shard in shards}, tmp_path)
  for shard, (status, _, error) in results.items():
    assert (status, error.count("\n")) == (1, 1) and f"--shard={shard}" in error


def _with_tiny_weights(cell, config, folder):
  """The cell of another encoder, with random weights of a miniature's size in place of those of the hub."""
  shrunk = shrink(cell.config(config, 0), folder, folder)
  return Cell(cell.name, cell.changes | {f"encoder.{key}": value for key, value in shrunk.encoder.items()})


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_runs_on_a_miniature(study, tmp_path, monkeypatch):
  """Two cells of each study, beside the config as it is."""
  encoder = "qwen2.5-0.5b" if study == "attention" else "minilm-l6"
  config = tiny_config(tmp_path, encoder=encoder)
  if study in ("prompts", "images", "adapters", "fusion"):
    config.images = 2
    config.features.update(dict(name="tiny", dim=8))
    write_random_features(prepare_data(config), config.dataset.data_dir, "tiny", 8)
  cells = grids.cells_of(study, config)[1:3]
  if study == "encoders":
    cells = [_with_tiny_weights(cell, config, tmp_path / f"cell{number}") for number, cell in enumerate(cells)]
  monkeypatch.setitem(STUDIES, study, lambda _: cells)
  runs = plan_study(study, config, 1, "validation", tmp_path / "out")
  run_study.run_study(runs)
  assert all(run.finished for run in runs)
  assert {result.cell for result in compare_cells(runs)} == {"as configured", *(cell.name for cell in cells)}
