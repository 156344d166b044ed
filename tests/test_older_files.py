"""Files of the first release line still load: a prepared set, features, a checkpoint and an index of commit df9262a.

The archive holds a miniature data set with images in the raw format, its pretrained encoder and image tower, the
prepared set, and a workdir that this commit trained for two epochs on one device, with relative paths in its config.
`answers.json` has what that commit predicted for the test queries.
"""

import json
from pathlib import Path
import tarfile

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.miniature import read_lines
from vixml_jax import sharding
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.inference.loading import load_predictor
from vixml_jax.run import configuration
from vixml_jax.search.label_index import LabelIndex

ARCHIVE = Path(__file__).parent / "fixtures" / "df9262a.tar.xz"


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The archive, unpacked; the current folder, which the config's relative paths start from."""
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(tmp_path, filter="data")
  monkeypatch.chdir(tmp_path)
  return tmp_path


def queries(folder):
  """The test queries with their images, as `predict` takes them."""
  found = [
    {key: record[key] for key in ("uid", "title", "content")} for record in read_lines(folder / "raw/tst.json.gz")
  ]
  for image in pq.read_table(folder / "raw/tst_images.parquet").to_pylist():
    found[image["row"]].setdefault("images", []).append(image["png"])
  return found


@pytest.mark.parametrize("row", ["plain", "retrieval_augmented"])
def test_an_older_workdir_answers_as_it_did(folder, row):
  predictor = load_predictor(
    folder / "run",
    retrieval_augmented=row == "retrieval_augmented",
    image_checkpoint="tower.npz",
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
  )
  wanted = json.loads((folder / "answers.json").read_text())[row]
  answers = predictor.predict(queries(folder), k=5)
  assert [[prediction[:3] for prediction in answer] for answer in answers] == [
    [tuple(prediction[:3]) for prediction in answer] for answer in wanted
  ]
  for answer, other in zip(answers, wanted, strict=True):
    np.testing.assert_allclose([found[3] for found in answer], [found[3] for found in other], rtol=1e-5)


def test_an_older_checkpoint_is_evaluated_on_its_prepared_set_with_the_same_numbers(folder):
  before = json.loads((folder / "run" / "final_metrics.json").read_text())
  again = evaluate_workdir(configuration.read(folder / "run" / "config.json"), folder / "run")
  assert again.keys() == before.keys()
  for name in before.keys() - {"train_seconds", "tokens_per_second"}:
    assert again[name] == pytest.approx(before[name], abs=1e-6), name


@pytest.mark.parametrize("kept", [False, True], ids=["as the run was", "with texts"])
def test_an_index_gets_the_texts_of_training_queries_only_if_that_is_asked_for(folder, kept):
  config = configuration.read(folder / "run" / "config.json")
  assert config.eval.query_texts is False and config.eval.retrieval_augmented
  config.eval.query_texts = kept
  evaluate_workdir(config, folder / "run")
  index = LabelIndex.open(folder / "run" / "index", checkpoint=None)
  if not kept:
    assert index.query_texts is None
    return
  rows = read_lines(folder / "raw/trn.json.gz")
  wanted = [" ".join(row[field] for field in config.dataset.text_fields) for row in rows]
  assert index.query_texts.take(np.arange(len(rows))) == [text[:200] for text in wanted]


def test_an_older_run_is_continued(folder):
  config = configuration.read(folder / "run" / "config.json")
  before = json.loads((folder / "run" / "final_metrics.json").read_text())
  final = train_and_evaluate(config, folder / "run")  # All its steps are done: the whole state is restored.
  assert final["P@1"] == pytest.approx(before["P@1"], abs=1e-6)
  assert final["train_seconds"] == before["train_seconds"]
