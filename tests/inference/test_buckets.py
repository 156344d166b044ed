"""Queries, results and workdirs in buckets: what arrives is what local files give, and what is damaged is named."""

import json
import os
from pathlib import Path
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.miniature_runs import ROOT, run_commands
from tests.helpers.s3_server import s3_server
from vixml_jax.errors import InputError
from vixml_jax.exporting.export import export
from vixml_jax.inference.batch_encoding import encode_file
from vixml_jax.inference.batch_prediction import predict_file
from vixml_jax.inference.block_runner import BatchFile
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.queries import query_format
from vixml_jax.inference.query_files import open_queries
from vixml_jax.inference.remote_workdir import local_workdir
from vixml_jax.process_share import ProcessShare
from vixml_jax.remote import Bucket, local_copy
from vixml_jax.tables import convert_shared

LINES = "".join(json.dumps({"title": f"{word} {i}"}) + "\n" for i, word in enumerate(["arrow", "cloud", "sun"] * 4))


@pytest.fixture(scope="module")
def predictor(texts_only):
  return load_predictor(texts_only.workdir)


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
  """fsspec's file system in memory, empty, and a cache of its own."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  files = fsspec.filesystem("memory")
  files.store.clear()
  files.pipe("/bucket/q.jsonl", LINES.encode())
  yield files
  files.store.clear()


def answer(predictor, queries, output, share=(0, 1), **options):
  path = local_copy(queries)
  batch = BatchFile(open_queries(path, query_format(predictor.encoder.config)), path, 5, ProcessShare(*share))
  return predict_file(predictor, batch, output, k=3, **options)


@pytest.fixture(scope="module")
def local(predictor, tmp_path_factory):
  """What is written without a bucket."""
  folder = tmp_path_factory.mktemp("local")
  (folder / "q.jsonl").write_text(LINES)
  answer(predictor, str(folder / "q.jsonl"), str(folder / "top.parquet"))
  return folder / "top.parquet"


def test_processes_share_a_bucket_and_write_what_local_files_get(predictor, memory, local):
  assert "files" not in answer(predictor, "memory://bucket/q.jsonl", "memory://bucket/top.parquet", (1, 2))
  assert len(memory.glob("/bucket/top.parquet.partial/*/done/*")) == 1
  done = answer(predictor, "memory://bucket/q.jsonl", "memory://bucket/top.parquet", (0, 2))
  assert memory.cat("/bucket/top.parquet") == local.read_bytes()
  assert json.loads(memory.cat("/bucket/top.parquet.stats.json")) == done
  assert sorted(memory.find("/bucket")) == ["/bucket/q.jsonl", "/bucket/top.parquet", "/bucket/top.parquet.stats.json"]
  assert answer(predictor, "memory://bucket/q.jsonl", "memory://bucket/top.parquet") == done


def test_a_damaged_part_in_a_bucket_is_named_and_answered_again(predictor, memory, local):
  answer(predictor, "memory://bucket/q.jsonl", "memory://bucket/top.parquet", (1, 2))
  (part,) = memory.glob("/bucket/top.parquet.partial/*/parts/*")
  content = bytearray(memory.cat(part))
  content[9] ^= 1
  memory.pipe(part, bytes(content))
  with pytest.raises(InputError, match="memory://bucket/top.parquet.partial/parts/top.00001-of-00003.parquet: is dam"):
    answer(predictor, "memory://bucket/q.jsonl", "memory://bucket/top.parquet", (0, 2))
  answer(predictor, "memory://bucket/q.jsonl", "memory://bucket/top.parquet", (1, 2))
  assert memory.cat("/bucket/top.parquet") == local.read_bytes()


def test_parts_and_embeddings_stay_in_a_folder_of_the_bucket(predictor, memory, local):
  for index in (1, 0):
    done = answer(predictor, "memory://bucket/q.jsonl", "memory://bucket/top.parquet", (index, 2), keep_parts=True)
  assert sorted(done["files"]) == [f"top/top.{number:05d}-of-00003.parquet" for number in range(3)]
  tables = [pq.read_table(memory.open(f"/bucket/{name}")) for name in sorted(done["files"])]
  assert [len(table) for table in tables] == [5, 5, 2]
  path = local_copy("memory://bucket/q.jsonl")
  batch = BatchFile(open_queries(path, query_format(predictor.encoder.config)), path, 7, ProcessShare())
  encode_file(predictor.encoder, None, batch, "memory://bucket/embeddings", dtype="float32")
  found = [
    row
    for name in sorted(memory.ls("/bucket/embeddings", detail=False))
    for row in pq.read_table(memory.open(name))["embedding"].to_pylist()
  ]
  wanted = predictor.encoder.embed([json.loads(line)["title"] for line in LINES.splitlines()])
  np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-6)
  with pytest.raises(InputError, match="memory://bucket/top: exists, and is not the result of this command"):
    predict_file(predictor, batch, "memory://bucket/top.parquet", k=2, keep_parts=True)


def upload(memory, workdir, place):
  for path in workdir.rglob("*"):
    if path.is_file():
      memory.pipe(f"{place}/{path.relative_to(workdir).as_posix()}", path.read_bytes())


def test_a_workdir_is_copied_once_and_answers_as_the_local_one(texts_only, predictor, memory, monkeypatch):
  upload(memory, texts_only.workdir, "/bucket/run")
  folder = local_workdir("memory://bucket/run")
  assert load_predictor(folder).predict(["arrow up"], 3) == predictor.predict(["arrow up"], 3)
  copied = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
  results = {"evaluation.json", "final_metrics.json"}
  assert copied == results | {"config.json", "inference.json", "tokenizer", "index", "checkpoints", "sha256.json"}
  assert not list(folder.glob("checkpoints/*/training"))
  monkeypatch.setattr(Bucket, "get", None)
  assert local_workdir("memory://bucket/run") == folder
  current = memory.cat("/bucket/run/index/CURRENT").decode().split()[0]
  monkeypatch.undo()
  memory.pipe(f"/bucket/run/index/{current}/index.json", b"{}")
  with pytest.raises(InputError, match="index.json: is damaged"):
    local_workdir("memory://bucket/run")


@pytest.mark.parametrize("name", ["index/*/labels.npy", "tokenizer/tokenizer.json", "checkpoints/*/model/_METADATA"])
def test_a_file_that_was_damaged_on_its_way_is_named_and_not_kept(texts_only, memory, tmp_path, name):
  upload(memory, texts_only.workdir, "/bucket/run")
  (path,) = memory.glob(f"/bucket/run/{name}")
  memory.pipe(path, memory.cat(path)[:-1] + b"?")
  with pytest.raises(InputError, match=f"memory:/{path}: is damaged .* copy the workdir there again"):
    local_workdir("memory://bucket/run")
  assert not list((tmp_path / "cache" / "vixml_jax" / "workdirs").glob("*/*"))


def test_what_is_missing_is_one_line(memory):
  for call, message in (
    (lambda: local_copy("memory://bucket/none.jsonl"), "memory://bucket/none.jsonl: no such file"),
    (lambda: local_workdir("memory://bucket/none"), "memory://bucket/none/config.json: no such file"),
    (lambda: local_copy("nosuch://bucket/q.jsonl"), "nosuch://bucket: cannot be reached"),
  ):
    with pytest.raises(InputError, match=message) as error:
      call()
    assert "\n" not in str(error.value)


def test_a_file_that_was_replaced_is_copied_again(memory):
  first = local_copy("memory://bucket/q.jsonl")
  assert local_copy("memory://bucket/q.jsonl") == first and first.read_text() == LINES
  memory.pipe("/bucket/q.jsonl", b"{}")
  assert local_copy("memory://bucket/q.jsonl").read_text() == "{}"


def test_commands_refuse_a_bucket_where_they_write_a_folder(tmp_path):
  done = run_commands(
    {"export": ["export", f"--workdir={tmp_path}", "--format=hf", "--output=gs://bucket/out"]}, tmp_path
  )
  for name, (status, stdout, stderr) in done.items():
    assert status == 1 and not stdout and stderr.count("\n") == 1, (name, stderr)
    assert "=gs://bucket/" in stderr and "must be a local path" in stderr, (name, stderr)
  assert not Path(ROOT, "gs:").exists()


@pytest.mark.slow
def test_commands_read_and_write_s3(texts_only, local, tmp_path):
  with s3_server() as (files, environment):
    files.put(str(texts_only.workdir), "bucket/run", recursive=True)
    files.pipe("bucket/q.jsonl", LINES.encode())
    flags = ["--workdir=s3://bucket/run", "--queries=s3://bucket/q.jsonl", "--output=s3://bucket/top.parquet"]
    command = [sys.executable, "-m", "vixml_jax.predict", *flags, "--k=3", "--batch_size=5", "--num_processes=2"]
    for index in range(2):
      done = subprocess.run(
        [*command, f"--process={index}"], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
      )
      assert done.returncode == 0, done.stderr
    assert files.cat("bucket/top.parquet") == local.read_bytes()


def test_a_table_or_a_folder_of_tables_in_a_bucket_is_read_like_a_local_one(memory, tmp_path):
  rows = [f"{word} {i},{word}" for i in range(20) for word in ("arrow", "cloud")]
  memory.pipe("/bucket/t/train.csv", ("\n".join(["text,labels", *rows[:30]]) + "\n").encode())
  memory.pipe("/bucket/t/test.csv", ("\n".join(["text,labels", *rows[30:]]) + "\n").encode())
  (tmp_path / "t").mkdir()
  for name in ("train.csv", "test.csv"):
    (tmp_path / "t" / name).write_bytes(memory.cat(f"/bucket/t/{name}"))
  for place in ("t", "t/train.csv"):
    near, far = (
      convert_shared(tmp_path / name, root + place)[0]
      for name, root in (("a", f"{tmp_path}/"), ("b", "memory://bucket/"))
    )
    assert (near.num_train, near.num_test, near.num_labels) == (far.num_train, far.num_test, far.num_labels)
    assert near.folder.parent.name == far.folder.parent.name
  with pytest.raises(InputError, match="memory://bucket/none.csv: no such file"):
    convert_shared(tmp_path, "memory://bucket/none.csv")


def test_a_workdir_in_a_bucket_is_exported_with_its_results(memory, texts_only, tmp_path):
  upload(memory, texts_only.workdir, "/bucket/run")
  export(local_workdir("memory://bucket/run"), "hf", tmp_path / "far")
  export(texts_only.workdir, "hf", tmp_path / "near")
  assert (tmp_path / "far/model.safetensors").read_bytes() == (tmp_path / "near/model.safetensors").read_bytes()
  near, far = ((tmp_path / name / "README.md").read_text() for name in ("near", "far"))
  results = [line for line in near.splitlines() if line.startswith("| ") and "training queries" not in line]
  assert len(results) > 2 and [line for line in far.splitlines() if line.startswith("| ")] == results
