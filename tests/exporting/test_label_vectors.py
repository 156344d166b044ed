"""Label vectors as Parquet: what the index has, in bounded row groups, with queries to check a search with."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.tiny_workdirs import exported
from vixml_jax.errors import InputError
from vixml_jax.exporting.label_vectors import write_label_vectors
from vixml_jax.inference.loading import load_predictor
from vixml_jax.run.checkpoint import checkpoint_id
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.label_index_files import IndexContents, write_index
from vixml_jax.search.vector_form import VectorForm


def vectors_of(table):
  return np.stack(table["vector"].to_numpy(zero_copy_only=False)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_vectors_are_the_labels_that_the_index_has(dtype, encoders, tmp_path):
  workdir = shutil.copytree(encoders("minilm-l6").workdir, tmp_path / "run")
  rng = np.random.default_rng(0)
  prototypes, queries = (rng.normal(size=(rows, 32)).astype(np.float32) for rows in (24, 8))
  texts, uids = [f"name {i} \u00e4" for i in range(24)], [f"label/{i}" for i in range(24)]
  deleted = np.isin(np.arange(24), [0, 7, 23])
  categories = [["tools"] * (i % 2) + ["tools", "metal"] * (i % 3 == 0) for i in range(24)]
  contents = IndexContents(
    prototypes, texts, uids, np.zeros(24, np.int32), np.zeros((8, 32)), deleted, categories=categories, held_out=queries
  )
  checkpoint = checkpoint_id(workdir / "checkpoints", 5)
  write_index(workdir / "index", contents, checkpoint=checkpoint, search="exact")
  (tmp_path / "blocks").mkdir()
  write_label_vectors(workdir, tmp_path / "blocks", dtype, group_bytes=5 * 32 * np.dtype(dtype).itemsize)
  kept = np.flatnonzero(~deleted)
  for folder in (exported(workdir, "label-vectors", tmp_path / "out", dtype=dtype), tmp_path / "blocks"):
    table = pq.read_table(folder / "labels.parquet")
    assert str(table.schema.field("vector").type.value_type) == {"float32": "float", "float16": "halffloat"}[dtype]
    assert table.schema.field("vector").type.list_size == 32
    np.testing.assert_array_equal(vectors_of(table), prototypes[kept].astype(dtype))
    rows = table.drop_columns("vector").to_pydict()
    assert rows["id"] == kept.tolist()
    assert rows["uid"] == [uids[i] for i in kept] and rows["text"] == [texts[i] for i in kept]
    assert [sorted(row) for row in rows["categories"]] == [sorted({*categories[i]}) for i in kept]
    metadata = json.loads(table.schema.metadata[b"vixml_jax"])
    assert metadata == {
      "metric": "inner_product",
      "dim": 32,
      "dtype": dtype,
      "num_labels": 21,
      "model": checkpoint,
      "index": {"snapshot": "000001", "edits": 0},
    }
    best = pq.read_table(folder / "queries.parquet")
    np.testing.assert_array_equal(vectors_of(best), queries.astype(dtype))
    scores = queries @ prototypes[kept].T
    order = np.argsort(-scores, axis=1)[:, :10]
    assert best["best"].to_pylist() == [[uids[kept[i]] for i in row] for row in order]
    wanted = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_allclose(np.stack(best["scores"].to_numpy(zero_copy_only=False)), wanted, rtol=1e-5)
  groups = pq.ParquetFile(tmp_path / "blocks/labels.parquet").metadata
  assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [5, 5, 5, 5, 1]
  write_index(workdir / "index", contents, checkpoint={"step": 4, "sha256": "0" * 64}, search="exact")
  with pytest.raises(InputError, match="was made from another checkpoint"):
    exported(workdir, "label-vectors", tmp_path / "other")


def test_the_best_labels_of_the_queries_are_those_of_the_index(texts_only, tmp_path):
  folder = exported(texts_only.workdir, "label-vectors", tmp_path / "out")
  best = pq.read_table(folder / "queries.parquet")
  index = LabelIndex.open(texts_only.workdir / "index", checkpoint=None)
  scores, ids = index.search(vectors_of(best), 10)
  assert best["best"].to_pylist() == [index.uids(row) for row in ids]
  np.testing.assert_allclose(np.stack(best["scores"].to_numpy(zero_copy_only=False)), scores, rtol=1e-5)
  assert "categories" not in pq.read_table(folder / "labels.parquet").column_names


def test_fewer_dimensions_have_the_scores_of_predict(texts_only, tmp_path):
  folder = exported(texts_only.workdir, "label-vectors", tmp_path / "out", dims=12)
  labels, best = (pq.read_table(folder / f"{name}.parquet") for name in ("labels", "queries"))
  assert labels.schema.field("vector").type.list_size == best.schema.field("vector").type.list_size == 12
  for table in (labels, best):
    metadata = json.loads(table.schema.metadata[b"vixml_jax"])
    assert (metadata["dim"], metadata["first_of"]) == (12, 32)
  whole = pq.read_table(exported(texts_only.workdir, "label-vectors", tmp_path / "whole") / "labels.parquet")
  norms = [np.linalg.norm(vectors_of(table), axis=1) for table in (labels, whole)]
  np.testing.assert_allclose(*norms, rtol=1e-5)
  index = LabelIndex.open(texts_only.workdir / "index", checkpoint=None, form=VectorForm(dims=12))
  scores, ids = index.search(vectors_of(pq.read_table(tmp_path / "whole" / "queries.parquet")), 10)
  assert best["best"].to_pylist() == [index.uids(row) for row in ids]
  np.testing.assert_allclose(np.stack(best["scores"].to_numpy(zero_copy_only=False)), scores, rtol=1e-5)
  assert "first 12 of 32 dimensions" in (folder / "README.md").read_text()
  assert (
    "dimensions" not in (tmp_path / "whole" / "README.md").read_text().split("Rank vectors")[1].split("The metadata")[0]
  )


@pytest.mark.parametrize(
  ("kind", "dims", "message"),
  [
    ("label-vectors", 33, "dims=33: must be 1 to 32, the dimension of the vectors"),
    ("onnx", 12, "--dims=12: only --format=label-vectors has it; leave it out"),
  ],
)
def test_dimensions_that_cannot_be_exported_are_refused_and_nothing_is_written(
  texts_only, tmp_path, kind, dims, message
):
  with pytest.raises(InputError, match=message):
    exported(texts_only.workdir, kind, tmp_path / "out", dims=dims)
  assert not (tmp_path / "out").exists()


def test_vectors_and_encoded_queries_rank_as_predict_does(texts_only, tmp_path):
  table = pq.read_table(exported(texts_only.workdir, "label-vectors", tmp_path / "out") / "labels.parquet")
  predictor, texts = load_predictor(texts_only.workdir), [query["title"] for query in texts_only.queries]
  scores = predictor.encode(texts) @ vectors_of(table).T
  uids = table["uid"].to_pylist()
  for row, answer in zip(scores, predictor.predict(texts, k=10), strict=True):
    np.testing.assert_allclose([row[uids.index(label.label)] for label in answer], np.sort(row)[::-1][:10], atol=1e-5)
