"""Label vectors in PostgreSQL with pgvector and in Qdrant: the scripts of `examples/` load them and rank as we do.

PostgreSQL is used where VIXML_JAX_POSTGRES has the URL of a database in which the tests may create the extension
`vector` and the table `vixml_jax_labels`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.repository import ROOT
from tests.helpers.tiny_workdirs import exported
from vixml_jax.inference.loading import load_predictor
from vixml_jax.run.checkpoint import checkpoint_id
from vixml_jax.search.label_index_files import IndexContents, write_index

pytestmark = pytest.mark.slow
TABLE = "vixml_jax_labels"


def script(name, *packages):
  for package in packages:
    pytest.importorskip(package, reason=f"needs {package}: pip install -c constraints.txt -e '.[vector-databases]'")
  spec = importlib.util.spec_from_file_location(f"{name}_load", ROOT / "examples" / name / "load.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def pgvector():
  """The script and a connection."""
  module = script("pgvector", "psycopg", "pgvector")
  if "VIXML_JAX_POSTGRES" not in os.environ:
    pytest.skip(
      "needs PostgreSQL with pgvector: apt-get install postgresql postgresql-17-pgvector, make a database as in "
      "CONTRIBUTING.md, and set VIXML_JAX_POSTGRES to its URL"
    )
  with module.psycopg.connect(os.environ["VIXML_JAX_POSTGRES"]) as connection:
    yield module, connection
    connection.execute(f"DROP TABLE IF EXISTS {TABLE}")


@pytest.fixture
def workdir(encoders, tmp_path):
  """A workdir with 500 labels in categories, of which some are deleted, and 40 queries to check a search with."""
  folder = shutil.copytree(encoders("minilm-l6").workdir, tmp_path / "run")
  rng = np.random.default_rng(0)
  labels, queries = (rng.normal(size=(rows, 32)).astype(np.float32) for rows in (500, 40))
  labels, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (labels, queries))
  contents = IndexContents(
    labels,
    [f"name {i} ä, 'quoted'\t\\" for i in range(500)],
    [f"label/{i}" for i in range(500)],
    np.zeros(500, np.int32),
    np.zeros((8, 32)),
    np.arange(500) % 50 == 3,
    categories=[["tools"] * (i % 2) + ["metal"] * (i % 3 == 0) for i in range(500)],
    held_out=queries,
  )
  write_index(folder / "index", contents, checkpoint=checkpoint_id(folder / "checkpoints", 5), search="exact")
  return folder


def columns_of(folder):
  return pq.read_table(folder / "labels.parquet").drop_columns("vector").to_pydict()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pgvector_has_the_labels_and_the_ten_best_of_each_query(dtype, pgvector, workdir, tmp_path):
  module, connection = pgvector
  folder = exported(workdir, "label-vectors", tmp_path / "out", dtype=dtype)
  assert module.load(connection, folder, TABLE) == 490
  assert module.load(connection, folder, TABLE) == 490  # It replaces the table.
  rows = connection.execute(f"SELECT id, uid, text, categories FROM {TABLE} ORDER BY id").fetchall()
  assert dict(zip(("id", "uid", "text", "categories"), map(list, zip(*rows, strict=True)), strict=True)) == columns_of(
    folder
  )
  same, share, number = module.compare(connection, folder, TABLE, exact=True)
  assert number == 40 and share >= (1 if dtype == "float32" else 0.97) and same >= (40 if dtype == "float32" else 30)
  assert module.compare(connection, folder, TABLE, exact=False)[1] > 0.95
  (plan,) = connection.execute(f"SELECT indexdef FROM pg_indexes WHERE tablename = '{TABLE}' AND indexdef ~ 'hnsw'")
  assert ("halfvec_ip_ops" if dtype == "float16" else "vector_ip_ops") in plan[0]


def test_pgvector_ranks_as_predict_does(pgvector, texts_only, tmp_path):
  module, connection = pgvector
  module.load(connection, exported(texts_only.workdir, "label-vectors", tmp_path / "out"), TABLE)
  predictor, texts = load_predictor(texts_only.workdir), [query["title"] for query in texts_only.queries]
  for vector, labels in zip(predictor.encode(texts), predictor.predict(texts, k=10), strict=True):
    check_answer(module.search(connection, TABLE, vector, 10, exact=True), labels)


def check_answer(found, labels):
  """Checks uids and scores of an answer. Labels whose scores are equal to five digits may change places."""
  np.testing.assert_allclose([score for _, score in found], [label.score for label in labels], atol=1e-5)
  scores = {label.label: label.score for label in labels}
  last = labels[-1].score
  assert all(abs(scores.get(uid, last) - score) < 1e-5 for uid, score in found)


def test_the_pgvector_script_prints_how_the_answers_compare(pgvector, workdir, tmp_path):
  folder, url = exported(workdir, "label-vectors", tmp_path / "out"), os.environ["VIXML_JAX_POSTGRES"]
  lines = run("pgvector", f"--vectors={folder}", f"--url={url}", f"--table={TABLE}").stdout.splitlines()
  assert lines[:2] == [
    f"490 labels in table {TABLE}",
    "exact search: the same ten best labels for 40 of 40 queries, 100.0% of the labels",
  ]
  assert lines[2].startswith("HNSW index: the same ten best labels for ")
  failed = run("pgvector", f"--vectors={tmp_path}", f"--url={url}", f"--table={TABLE}")
  assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def run(name, *flags):
  command = [sys.executable, str(ROOT / "examples" / name / "load.py"), *flags]
  return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_qdrant_has_the_labels_and_the_ten_best_of_each_query(dtype, workdir, tmp_path):
  module = script("qdrant", "qdrant_client")
  client = module.QdrantClient(":memory:")
  folder = exported(workdir, "label-vectors", tmp_path / "out", dtype=dtype)
  assert module.load(client, folder, "labels") == module.load(client, folder, "labels") == 490
  points, _ = client.scroll("labels", limit=1000)
  rows = [{"id": point.id, **point.payload} for point in points]
  assert {key: [row[key] for row in rows] for key in rows[0]} == columns_of(folder)
  same, share, number = module.compare(client, folder, "labels")
  assert number == 40 and share >= (1 if dtype == "float32" else 0.97) and same >= (40 if dtype == "float32" else 30)


def test_qdrant_ranks_as_predict_does(texts_only, tmp_path):
  module = script("qdrant", "qdrant_client")
  client = module.QdrantClient(":memory:")
  module.load(client, exported(texts_only.workdir, "label-vectors", tmp_path / "out"), "labels")
  predictor, texts = load_predictor(texts_only.workdir), [query["title"] for query in texts_only.queries]
  for vector, labels in zip(predictor.encode(texts), predictor.predict(texts, k=10), strict=True):
    check_answer(module.search(client, "labels", vector.tolist(), 10), labels)


@pytest.mark.parametrize("place", ["--path={}/qdrant", "--url=:memory:"])
def test_the_qdrant_script_prints_how_the_answers_compare(place, workdir, tmp_path):
  script("qdrant", "qdrant_client")
  folder, place = exported(workdir, "label-vectors", tmp_path / "out"), place.format(tmp_path)
  result = run("qdrant", f"--vectors={folder}", place, "--collection=icons")
  assert result.stdout.splitlines() == [
    "490 labels in collection icons",
    "exact search: the same ten best labels for 40 of 40 queries, 100.0% of the labels",
  ]
  assert result.stderr == ""
  failed = run("qdrant", f"--vectors={tmp_path}", place)
  assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
