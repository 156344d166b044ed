"""Processes that divide a file of queries write the bytes of one process, also after kills and in another number."""

import csv
import json
from pathlib import Path
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.damage import DAMAGES
from tests.helpers.miniature_runs import ROOT, run_commands
from vixml_jax.errors import InputError
from vixml_jax.inference.batch_encoding import encode_file
from vixml_jax.inference.batch_prediction import predict_file
from vixml_jax.inference.block_runner import BatchFile
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.queries import QueryFormat, query_format
from vixml_jax.inference.query_files import open_queries
from vixml_jax.process_share import ProcessShare
from vixml_jax.search.prefixes import scaled_prefix

BATCH, QUERIES, BLOCKS = 3, 20, 7
FORM = QueryFormat(("title",), images=0, feature_dim=1)
WORDS = ["arrow", "cloud", "sun", "rain", "user", "file", "lock"]


@pytest.fixture(scope="module")
def predictor(texts_only):
  return load_predictor(texts_only.workdir)


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
  path = tmp_path_factory.mktemp("queries") / "q.jsonl"
  titles = [" ".join(WORDS[i % 7 : i % 7 + i % 3 + 1]) for i in range(QUERIES)]
  path.write_text("\n\n".join(json.dumps({"title": title, "uid": f"q/{i}"}) for i, title in enumerate(titles)))
  return path


@pytest.fixture(scope="module")
def one(predictor, queries, tmp_path_factory):
  """Suffix -> what a single process writes."""
  folder = tmp_path_factory.mktemp("one")
  for suffix in (".jsonl", ".csv", ".parquet"):
    answer(predictor, queries, folder / f"top{suffix}")
  return {path.suffix: path.read_bytes() for path in folder.glob("top.*") if not path.name.endswith(".stats.json")}


class Killed(Exception):
  pass


class Searches:
  """Counts the queries that are searched, and ends the process at the search after `left` more."""

  def __init__(self):
    self.queries, self.left = 0, 1000

  def take(self, count):
    if not self.left:
      raise Killed
    self.left -= 1
    self.queries += count


@pytest.fixture
def searches(predictor, monkeypatch):
  counter, search = Searches(), type(predictor).search

  def counted(self, embeddings, *args, **kwargs):
    counter.take(len(embeddings))
    return search(self, embeddings, *args, **kwargs)

  monkeypatch.setattr(type(predictor), "search", counted)
  return counter


def batch_of(path, encoder, share, size=BATCH):
  return BatchFile(open_queries(path, query_format(encoder.config)), path, size, ProcessShare(*share))


def answer(predictor, path, output, share=(0, 1), k=4, **options):
  return predict_file(predictor, batch_of(path, predictor.encoder, share), str(output), k=k, **options)


@pytest.mark.parametrize("suffix,order", [(".jsonl", (0, 1, 2)), (".csv", (2, 0, 1)), (".parquet", (1, 2, 0))])
def test_the_last_of_several_processes_writes_the_file_of_one(
  predictor, queries, one, tmp_path, searches, suffix, order
):
  output = tmp_path / f"top{suffix}"
  *first, last = [answer(predictor, queries, output, (index, 3)) for index in order]
  assert all("files" not in statistics for statistics in first)
  assert list(last["files"]) == [output.name] and last["processes"] == 3
  own = [statistics["queries_of_this_process"] for statistics in (*first, last)]
  assert sum(own) == searches.queries == QUERIES and max(own) <= 3 * BATCH
  assert output.read_bytes() == one[suffix]
  assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, f"{output.name}.stats.json"]


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_killed_and_resumed_in_another_number_no_query_is_answered_twice(
  predictor, queries, one, tmp_path, searches, before, after
):
  output = tmp_path / "top.jsonl"
  for index in range(before):
    searches.left = 1
    with pytest.raises(Killed):
      answer(predictor, queries, output, (index, before))
  finished = len(list((tmp_path / "top.jsonl.partial").glob("*/done/*")))
  assert finished == before
  searches.queries, searches.left = 0, 1000
  for index in range(after):
    answer(predictor, queries, output, (index, after))
  assert searches.queries == QUERIES - BATCH * finished
  assert output.read_bytes() == one[".jsonl"]


def test_a_command_whose_result_exists_does_nothing(predictor, queries, one, tmp_path, searches, caplog):
  output = tmp_path / "top.jsonl"
  done = answer(predictor, queries, output)
  before = searches.queries
  with caplog.at_level("INFO", "vixml_jax"):
    assert answer(predictor, queries, output, (1, 2)) == done
  assert searches.queries == before and "nothing to do" in caplog.text
  assert not (tmp_path / "top.jsonl.partial").exists()
  answer(predictor, queries, output, k=3)
  assert searches.queries == before + QUERIES
  DAMAGES["flipped bit"](output)
  answer(predictor, queries, output, k=4)
  assert output.read_bytes() == one[".jsonl"]


def test_a_part_of_another_process_that_was_damaged_is_named_and_answered_again(predictor, queries, one, tmp_path):
  output = tmp_path / "top.jsonl"
  answer(predictor, queries, output, (0, 2))
  DAMAGES["flipped bit"](next((tmp_path / "top.jsonl.partial").glob("*/parts/top.00002-of-00007.jsonl")))
  with pytest.raises(InputError, match=r"top.00002-of-00007.jsonl: is damaged .* start all processes again"):
    answer(predictor, queries, output, (1, 2))
  assert not output.exists()
  answer(predictor, queries, output, (0, 2))
  assert output.read_bytes() == one[".jsonl"]


def test_parts_of_another_k_are_refused_in_any_process(predictor, queries, tmp_path):
  answer(predictor, queries, tmp_path / "top.jsonl", (0, 2))
  with pytest.raises(InputError, match=r"top.jsonl.partial: was started with another k; use the former value"):
    answer(predictor, queries, tmp_path / "top.jsonl", (1, 2), k=3)


def read_csv(path):
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_kept_parts_are_files_of_their_format(predictor, queries, one, tmp_path, searches, suffix):
  output = tmp_path / f"top{suffix}"
  for index in (1, 0):
    done = answer(predictor, queries, output, (index, 2), keep_parts=True)
  names = [f"top.{number:05d}-of-{BLOCKS:05d}{suffix}" for number in range(BLOCKS)]
  assert sorted(path.name for path in (tmp_path / "top").iterdir()) == names
  assert sorted(done["files"]) == [f"top/{name}" for name in names]
  (tmp_path / f"one{suffix}").write_bytes(one[suffix])
  if suffix == ".parquet":
    assert pq.read_table(tmp_path / "top").equals(pq.read_table(tmp_path / "one.parquet"))
  else:
    found = [row for name in names for row in read_csv(tmp_path / "top" / name)]
    assert found == read_csv(tmp_path / "one.csv")
  before = searches.queries
  assert answer(predictor, queries, output, keep_parts=True) == done and searches.queries == before
  with pytest.raises(InputError, match="top: exists, and is not the result of this command; remove it"):
    answer(predictor, queries, output, k=2, keep_parts=True)


def test_embeddings_of_items_are_those_of_the_encoder(predictor, queries, tmp_path):
  encoder, items = predictor.encoder, [json.loads(line) for line in queries.read_text().split("\n\n")]
  wanted = encoder.embed([item["title"] for item in items])
  for dtype, atol in (("float32", 1e-6), ("float16", 5e-4)):
    for index in (1, 0):
      done = encode_file(encoder, None, batch_of(queries, encoder, (index, 2), 8), str(tmp_path / dtype), dtype=dtype)
    assert len(done["files"]) == 3 and done["encode"]["first_block"]["queries_per_second"] > 0
    table = pq.read_table(tmp_path / dtype)
    assert table.schema.field("embedding").type == pa.list_(getattr(pa, dtype)(), wanted.shape[1])
    assert table["row"].to_pylist() == list(range(QUERIES))
    assert table["uid"].to_pylist() == [item["uid"] for item in items]
    found = np.concatenate([chunk.flatten().to_numpy() for chunk in table["embedding"].chunks])
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=atol)


def test_embeddings_of_fewer_dimensions_have_unit_norm_and_are_no_continuation_of_others(predictor, queries, tmp_path):
  encoder, items = predictor.encoder, [json.loads(line) for line in queries.read_text().split("\n\n")]
  encode_file(encoder, None, batch_of(queries, encoder, (0, 1), 8), str(tmp_path / "out"), dtype="float32", dims=12)
  found = np.stack(pq.read_table(tmp_path / "out")["embedding"].to_pylist())
  np.testing.assert_allclose(found, scaled_prefix(encoder.embed([item["title"] for item in items]), 12), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
  with pytest.raises(InputError, match="out: exists, and is not the result of this command"):
    encode_file(encoder, None, batch_of(queries, encoder, (0, 1), 8), str(tmp_path / "out"), dtype="float32")


def test_items_with_images_are_encoded_with_them_and_bad_images_listed(with_images, tmp_path):
  predictor = load_predictor(with_images.workdir)
  given = [dict(query, images=query.get("images", [])) for query in with_images.queries]
  wanted = predictor.encode(given)
  given[0]["images"] = [b"", *given[0]["images"]]
  types = {"images": pa.list_(pa.binary()), "deny": pa.list_(pa.string())}
  schema = pa.schema([(key, types.get(key, pa.string())) for key in ("uid", "title", "content", "images", "deny")])
  pq.write_table(pa.Table.from_pylist(given, schema), tmp_path / "q.parquet")
  batch = batch_of(tmp_path / "q.parquet", predictor.encoder, (0, 1), 5)
  encode_file(predictor.encoder, predictor.image_encoder, batch, str(tmp_path / "out"), dtype="float32")
  found = np.stack(pq.read_table(tmp_path / "out")["embedding"].to_pylist())
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  bad = (tmp_path / "out.bad_images.jsonl").read_text()
  assert json.loads(bad) == {"row": 0, "image": 0, "reason": "no bytes"}


def write(path, titles):
  if path.suffix == ".jsonl":
    path.write_text("\n \n".join(json.dumps({"title": title}) for title in titles))
  elif path.suffix == ".csv":
    with path.open("w", newline="") as file:
      csv.writer(file).writerows([["title"], *([title] for title in titles)])
  else:
    pq.write_table(pa.table({"title": titles}), path, row_group_size=4)
  return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("size", [1, 3, 5, 50])
def test_a_process_reads_the_rows_of_its_blocks_only(tmp_path, suffix, size):
  titles = [f'{number}, "a"\nb' for number in range(23)]
  path = write(tmp_path / f"q{suffix}", titles)
  blocks = {number: titles[start : start + size] for number, start in enumerate(range(0, 23, size))}
  for share in (ProcessShare(0, 2), ProcessShare(1, 2), ProcessShare(2, 5)):
    seen = []
    assert open_queries(path, FORM).check(size, share.has, lambda query, seen=seen: seen.append(query.text)) == 23
    own = {number: block for number, block in blocks.items() if share.has(number)}
    assert seen == [title for block in own.values() for title in block]
    found = dict(open_queries(path, FORM).blocks(size, share.has))
    assert {number: [query.text for query in block] for number, block in found.items()} == own


def test_row_groups_without_rows_of_a_process_are_not_read(tmp_path, monkeypatch):
  path, read = write(tmp_path / "q.parquet", list(map(str, range(24)))), []
  iter_batches = pq.ParquetFile.iter_batches

  def recorded(self, *args, row_groups, **kwargs):
    read.extend(row_groups)
    return iter_batches(self, *args, row_groups=row_groups, **kwargs)

  monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
  assert dict(open_queries(path, FORM).blocks(8, ProcessShare(1, 3).has)).keys() == {1}
  assert read == [2, 3]


def test_lines_of_other_processes_are_not_parsed(tmp_path):
  path = tmp_path / "q.jsonl"
  path.write_text('{"title": "a"}\n{"title": \n')
  assert open_queries(path, FORM).check(1, ProcessShare(0, 2).has, lambda query: None) == 2
  with pytest.raises(InputError, match="q.jsonl:2: not valid JSON"):
    open_queries(path, FORM).check(1, ProcessShare(1, 2).has, lambda query: None)


@pytest.mark.slow
def test_commands_divide_the_work_by_their_numbers(texts_only, queries, one, tmp_path):
  model = [f"--workdir={texts_only.workdir}", f"--queries={queries}", "--batch_size=3", "--mesh=8,1,1"]
  predict = ["predict", *model, "--k=4", f"--output={tmp_path / 'top.jsonl'}"]
  encode = ["encode", *model, "--dtype=float16", f"--output={tmp_path / 'embeddings'}"]
  train = ["main", "--config=configs/custom.py"]
  done = run_commands(
    {
      "first": [*predict, "--num_processes=2", "--process=1"],
      "last": [*predict, "--num_processes=2", "--process=0"],
      "parts": [*predict, "--keep_parts"],
      "encode first": [*encode, "--num_processes=2", "--process=1"],
      "encode last": [*encode, "--num_processes=2", "--process=0"],
      "encode again": [*encode, "--batch_size=4"],
      "number": [*predict, "--num_processes=2", "--process=2"],
      "half": [*predict, "--num_processes=2"],
      "none": [*predict, "--num_processes=0", "--process=0"],
      "train": [*train, "--num_processes=2", "--process=0"],
    },
    tmp_path,
  )
  for name, line in {
    "first": "9 queries are answered; the last process writes",
    "last": "top.jsonl: predictions for 20 queries",
    "parts": "top.jsonl: predictions for 20 queries",
    "encode first": "9 items are encoded; the last process completes",
    "encode last": "embeddings: embeddings of 20 items in 7 files",
  }.items():
    assert done[name][0] == 0 and line in done[name][1], done[name]
  assert (tmp_path / "top.jsonl").read_bytes() == one[".jsonl"]
  assert len(list((tmp_path / "top").iterdir())) == BLOCKS
  for name, line in {
    "encode again": "embeddings: exists, and is not the result of this command",
    "number": "--process=2: must be 0 to 1, since --num_processes=2",
    "half": "--num_processes: must be given together with --process",
    "none": "--num_processes=0",
    "train": "--num_processes=2: needs --coordinator=HOST:PORT",
  }.items():
    status, stdout, stderr = done[name]
    errors = [text for text in stderr.splitlines() if text.startswith("error: ")]
    assert status == 1 and not stdout and len(errors) == 1 and line in errors[0], done[name]


def _start(arguments):
  command = [sys.executable, "-m", "vixml_jax.predict", *arguments]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_that_jax_joins_divide_the_work(texts_only, queries, one, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  flags = [f"--workdir={texts_only.workdir}", f"--queries={queries}", "--batch_size=3", "--k=4"]
  flags += [f"--output={tmp_path / 'top.jsonl'}", f"--coordinator={address}", "--num_processes=2"]
  processes = [_start([*flags, f"--process={index}"]) for index in range(2)]
  for process in processes:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "predictions for 20 queries" in stdout
  assert (tmp_path / "top.jsonl").read_bytes() == one[".jsonl"]


@pytest.mark.slow
def test_two_processes_are_killed_and_three_finish(texts_only, queries, one, tmp_path):
  flags = [f"--workdir={texts_only.workdir}", f"--queries={queries}", "--batch_size=3", "--k=4"]
  flags += [f"--output={tmp_path / 'top.jsonl'}"]
  partial = Path(tmp_path / "top.jsonl.partial")
  processes = [_start([*flags, "--num_processes=2", f"--process={index}"]) for index in range(2)]
  while not list(partial.glob("*/done/0*")) and any(process.poll() is None for process in processes):
    pass
  for process in processes:
    process.kill()
    process.communicate()
  processes = [_start([*flags, "--num_processes=3", f"--process={index}"]) for index in range(3)]
  assert [(process.communicate(), process.returncode)[1] for process in processes] == [0, 0, 0]
  assert (tmp_path / "top.jsonl").read_bytes() == one[".jsonl"]
