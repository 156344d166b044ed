"""NGAME and DEXA from raw files to predictions: training, evaluation, search, new labels and exports."""

import dataclasses

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.common import use_method
from tests.helpers.miniature import read_lines
from tests.helpers.miniature_runs import miniature_config
from vixml_jax import sharding
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.exporting.export import export
from vixml_jax.inference.label_files import label_format
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.new_labels import add_labels, embed_labels
from vixml_jax.row_files import RowFiles


@dataclasses.dataclass(frozen=True)
class Run:
  config: object
  folder: object
  final: dict
  predictor: object

  def embeddings(self, name):
    return np.asarray(RowFiles(self.folder / "run" / "embeddings", name).load())

  @property
  def titles(self):
    return [label["title"] for label in read_lines(self.folder / "raw" / "lbl.json.gz")]


@pytest.fixture(scope="module", params=["ngame", "dexa"])
def run(request, tmp_path_factory):
  """A workdir that was trained for one epoch by a method."""
  folder = tmp_path_factory.mktemp(request.param)
  config = miniature_config(folder, num_train=24)
  config.train.epochs = 1
  use_method(config, request.param)
  final = train_and_evaluate(config, folder / "run")
  predictor = load_predictor(folder / "run", mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  return Run(config, folder, final, predictor)


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_labels_are_scored_by_the_formula_of_the_method(run):
  params = run.predictor.encoder.params
  pooled = run.predictor.encoder.pooled(run.titles)
  if run.config.method == "ngame":
    assert set(params) == {"encoder"}
    wanted = unit(pooled)
  else:
    assert set(params) == {"encoder", "free_vectors"}
    free, clusters = np.asarray(params["free_vectors"]), np.asarray(run.predictor.index.label_clusters)
    assert len(set(clusters.tolist())) == run.config.train.free_vectors
    wanted = unit(pooled + free[clusters])
    assert np.abs(wanted - unit(pooled)).max() > 0.01
  np.testing.assert_allclose(run.embeddings("labels"), wanted, atol=2e-5)
  queries = ["snow rain", "horse chip"]
  scores = run.predictor.encode(queries) @ wanted.T
  for answer, row in zip(run.predictor.predict(queries, k=3), scores, strict=True):
    np.testing.assert_allclose([found[3] for found in answer], np.sort(row)[::-1][:3], atol=2e-5)


def test_evaluation_of_the_workdir_gives_the_numbers_of_training(run):
  again = evaluate_workdir(run.config, run.folder / "run")
  for name in run.final:
    if "@" in name:
      assert again[name] == pytest.approx(run.final[name], abs=1e-6), name


def test_a_new_label_with_the_title_of_another_gets_its_embedding_if_it_is_in_the_same_cluster(run):
  records = [{"uid": f"new/{i}", "title": title} for i, title in enumerate(run.titles)]
  labels = [label_format(run.config).parse(record, "label") for record in records]
  embedded = embed_labels(run.predictor, labels)
  old = run.predictor.index
  same = embedded.clusters == old.label_clusters
  assert same.all() if run.config.method == "ngame" else same.mean() > 0.5
  np.testing.assert_allclose(embedded.prototypes[same], np.asarray(old.embeddings)[same], atol=2e-5)
  added = add_labels(old, labels[:1], embed_labels(run.predictor, labels[:1]), [])
  found = dataclasses.replace(run.predictor, index=added).predict([run.titles[0]], k=len(run.titles) + 1)[0]
  assert "new/0" in [prediction.label for prediction in found]


def test_embeddings_and_encoder_are_exported(run, tmp_path):  # Another test may have added a label.
  export(run.folder / "run", "label-vectors", tmp_path / "vectors")
  exported = np.stack(pq.read_table(tmp_path / "vectors" / "labels.parquet")["vector"].to_pylist())
  np.testing.assert_allclose(exported[: len(run.titles)], run.embeddings("labels"), atol=1e-6)
  export(run.folder / "run", "hf", tmp_path / "hf")
  assert (tmp_path / "hf" / "model.safetensors").is_file()
