"""`predict` reads and writes every format, resumes after a kill, and reports bad input in one line."""

import csv
import errno
import json
import os
from pathlib import Path
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.damage import DAMAGES, hide_a_page
from tests.helpers.miniature_runs import run_commands
from vixml_jax.errors import InputError
from vixml_jax.inference import part_store
from vixml_jax.inference.batch_prediction import predict_file, prepare_output
from vixml_jax.inference.block_runner import BatchFile
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.queries import query_format
from vixml_jax.inference.query_files import open_queries
from vixml_jax.process_share import ProcessShare

BATCH = 3


@pytest.fixture(scope="module")
def predictor(with_images):
  return load_predictor(with_images.workdir)


@pytest.fixture(scope="module")
def queries(with_images, predictor):
  """Test queries, with feature vectors in place of images, as JSON and Parquet can hold them."""
  found = [dict(query) for query in with_images.queries]
  for query in found:
    if "images" in query:
      query["images"] = [vector.tolist() for vector in predictor.image_encoder(query["images"])[0]]
  found[4]["title"] = 'of, "commas" and\nlines'
  found[5]["allow"] = []
  return found


@pytest.fixture(scope="module")
def expected(predictor, queries):
  return predictor.predict(queries, k=4)


def write_queries(path, queries):
  if path.suffix == ".jsonl":
    path.write_text("\n\n".join(json.dumps(query) for query in queries))
  elif path.suffix == ".parquet":
    lists = {"images": pa.list_(pa.list_(pa.float32())), "allow": pa.list_(pa.string()), "deny": pa.list_(pa.string())}
    schema = pa.schema([(key, pa.string()) for key in ("uid", "title", "content")] + list(lists.items()))
    pq.write_table(pa.Table.from_pylist(queries, schema), path, row_group_size=5)
  else:
    columns = ("deny", "title", "images", "uid", "content", "allow")
    with path.open("w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(columns)
      for query in queries:
        writer.writerow(
          [json.dumps(query[name]) if isinstance(query.get(name), list) else query.get(name, "") for name in columns]
        )
  return path


def read_answers(path):
  """Returns uid and predictions (label, id, text, score) of each row."""
  if path.suffix == ".csv":
    rows = {}
    with path.open(newline="") as file:
      for line in csv.DictReader(file):
        rows.setdefault((int(line["row"]), line["uid"]), []).append(
          (line["label"], int(line["id"]), line["text"], float(line["score"]))
        )
        assert int(line["rank"]) == len(rows[int(line["row"]), line["uid"]])
    return {row: (uid, found) for (row, uid), found in rows.items()}
  records = (
    pq.read_table(path).to_pylist()
    if path.suffix == ".parquet"
    else [json.loads(line) for line in path.read_text().splitlines()]
  )
  assert [record["row"] for record in records] == list(range(len(records)))
  return {
    record["row"]: (record["uid"], [tuple(found.values()) for found in record["predictions"]]) for record in records
  }


ALONE = ProcessShare()


def answer(predictor, path, output, k=4, batch_size=BATCH, share=ALONE, **options):
  opened = open_queries(path, query_format(predictor.encoder.config))
  return predict_file(predictor, BatchFile(opened, path, batch_size, share), str(output), k=k, **options)


def finished_parts(partial):
  """Paths of the parts in a folder of finished blocks, in order."""
  return sorted(partial.glob("*/parts/*"))


@pytest.mark.parametrize("source,target", [(".jsonl", ".jsonl"), (".csv", ".csv"), (".parquet", ".parquet")])
def test_every_format_gives_what_the_api_gives(predictor, queries, expected, tmp_path, source, target):
  path, output = write_queries(tmp_path / f"q{source}", queries), tmp_path / f"top{target}"
  statistics = answer(predictor, path, output)
  answers = read_answers(output)
  if target == ".csv":  # CSV has no line for a query without predictions.
    assert 5 not in answers
    answers[5] = ("test/5", [])
  assert len(answers) == len(queries)
  for row, wanted in enumerate(expected):
    uid, found = answers[row]
    assert uid == queries[row]["uid"]
    assert [label[:3] for label in found] == [label[:3] for label in wanted]
    np.testing.assert_allclose([label[3] for label in found], [label.score for label in wanted], atol=5e-6)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
    [path.name, output.name, f"{output.name}.stats.json"]
  )
  assert json.loads((tmp_path / f"{output.name}.stats.json").read_text()) == statistics
  assert statistics["queries"] == len(queries)
  for part in ("encode", "search"):
    assert 0 < statistics[part]["p50_ms"] <= statistics[part]["p99_ms"] and statistics[part]["queries_per_second"] > 0
    assert statistics[part]["first_block"]["ms"] > 0 and statistics[part]["first_block"]["queries_per_second"] > 0


class Killed(Exception):
  pass


def kill_in_block(number, predictor, monkeypatch):
  """Raises `Killed` when the predictor searches its block of this number, counted from now."""
  calls, search = iter(range(1000)), type(predictor).search

  def search_or_die(self, *args, **kwargs):
    if next(calls) == number:
      raise Killed
    return search(self, *args, **kwargs)

  monkeypatch.setattr(type(predictor), "search", search_or_die)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_killed_and_started_again_it_writes_the_same_file_to_the_bit(predictor, queries, tmp_path, monkeypatch, suffix):
  path = write_queries(tmp_path / "q.jsonl", queries)
  answer(predictor, path, tmp_path / f"undisturbed{suffix}")
  output = tmp_path / f"top{suffix}"
  for block in (2, 0):
    kill_in_block(block, predictor, monkeypatch)
    with pytest.raises(Killed):
      answer(predictor, path, output)
    monkeypatch.undo()
    assert not output.exists()
  assert len(finished_parts(tmp_path / f"top{suffix}.partial")) == 2
  statistics = answer(predictor, path, output)
  assert statistics["queries_of_earlier_runs"] == 2 * BATCH
  assert output.read_bytes() == (tmp_path / f"undisturbed{suffix}").read_bytes()
  assert not (tmp_path / f"top{suffix}.partial").exists()


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_part_is_answered_again(predictor, queries, tmp_path, monkeypatch, caplog, kind):
  path, output = write_queries(tmp_path / "q.jsonl", queries), tmp_path / "top.jsonl"
  answer(predictor, path, tmp_path / "undisturbed.jsonl")
  kill_in_block(3, predictor, monkeypatch)
  with pytest.raises(Killed):
    answer(predictor, path, output)
  monkeypatch.undo()
  finished = finished_parts(tmp_path / "top.jsonl.partial")
  DAMAGES[kind](finished[0])
  assert answer(predictor, path, output)["queries_of_earlier_runs"] == (len(finished) - 1) * BATCH
  assert output.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
  assert f"{finished[0].name}: " in caplog.text and "so its queries are answered again" in caplog.text


def test_a_part_that_was_not_recorded_is_answered_again(predictor, queries, tmp_path, monkeypatch):
  path, output = write_queries(tmp_path / "q.jsonl", queries), tmp_path / "top.jsonl"
  kill_in_block(3, predictor, monkeypatch)
  with pytest.raises(Killed):
    answer(predictor, path, output)
  monkeypatch.undo()
  finished = sorted((tmp_path / "top.jsonl.partial").glob("*/done/*"))
  finished[0].unlink()
  finished[1].write_text("{")
  assert answer(predictor, path, output)["queries_of_earlier_runs"] == (len(finished) - 2) * BATCH


def test_a_full_disk_is_one_line_and_finished_parts_stay(predictor, queries, tmp_path, monkeypatch):
  path, output = write_queries(tmp_path / "q.jsonl", queries), tmp_path / "top.jsonl"
  describe, calls = part_store.describe_file, iter(range(1000))

  def full_at_the_second(part):
    if next(calls) == 1:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return describe(part)

  with monkeypatch.context() as patched, pytest.raises(InputError) as error:
    patched.setattr(part_store, "describe_file", full_at_the_second)
    answer(predictor, path, output)
  assert "top.00001-of-00006.jsonl: cannot be written (No space left on device); nothing that was stored" in str(
    error.value
  )
  assert answer(predictor, path, output)["queries_of_earlier_runs"] == BATCH


def test_a_file_that_was_started_with_another_input_or_settings_is_refused(predictor, queries, tmp_path, monkeypatch):
  path, output = write_queries(tmp_path / "q.jsonl", queries), tmp_path / "top.jsonl"
  kill_in_block(1, predictor, monkeypatch)
  with pytest.raises(Killed):
    answer(predictor, path, output)
  monkeypatch.undo()
  with pytest.raises(
    InputError, match="top.jsonl.partial: was started with another k; use the former value, or delete"
  ):
    answer(predictor, path, output, k=3)
  with pytest.raises(InputError, match="was started with another batch_size"):
    answer(predictor, path, output, batch_size=4)
  write_queries(path, queries[:-1])
  with pytest.raises(InputError, match="was started with another queries_sha256"):
    answer(predictor, path, output)
  shutil.rmtree(tmp_path / "top.jsonl.partial")
  assert answer(predictor, path, output)["queries_of_earlier_runs"] == 0


def test_images_are_read_from_files_or_the_table_and_bad_ones_listed(with_images, predictor, tmp_path, expected):
  given = with_images.queries
  records = []
  for i, query in enumerate(given):
    names = [f"{i}-{j}.png" for j in range(len(query.get("images", [])))]
    for name, png in zip(names, query.get("images", []), strict=True):
      (tmp_path / name).write_bytes(png)
    records.append(query | {"images": names})
  records[0]["images"].insert(0, "none.png")
  in_table = [query | {"images": query.get("images", [])} for query in given]
  in_table[0]["images"] = [b"", *in_table[0]["images"]]
  schema = pa.schema(
    [
      ("title", pa.string()),
      ("content", pa.string()),
      ("images", pa.list_(pa.binary())),
      ("deny", pa.list_(pa.string())),
    ]
  )
  pq.write_table(pa.Table.from_pylist(in_table, schema), tmp_path / "q.parquet")
  for path, reason in (
    (write_queries(tmp_path / "q.jsonl", records), "the file cannot be read"),
    (tmp_path / "q.parquet", "no bytes"),
  ):
    output = tmp_path / f"{path.suffix[1:]}.jsonl"
    answer(predictor, path, output)
    found = read_answers(output)
    for row in (row for row in range(len(given)) if row not in (4, 5)):  # The fixture changed rows 4 and 5.
      assert [label[1] for label in found[row][1]] == [label.id for label in expected[row]]
    bad = (tmp_path / f"{output.name}.bad_images.jsonl").read_text()
    assert json.loads(bad) == {"row": 0, "image": 0, "reason": reason}


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-9])


def _write(name, content):
  def write(folder, queries):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name

  return write


def _cut(name):
  def write(folder, queries):
    path = write_queries(folder / name, queries)
    path.write_bytes(path.read_bytes()[:-12])
    return path

  return write


def _with_a_hidden_page(folder, queries):
  path = write_queries(folder / "q.parquet", queries)
  hide_a_page(path)
  return path


def _table(**columns):
  def write(folder, queries):
    pq.write_table(pa.table(columns), folder / "q.parquet")
    return folder / "q.parquet"

  return write


@pytest.mark.parametrize(
  "write,message",
  [
    (
      _write("q.jsonl", '{"title": "a"}\n{"title": "b", "target_ind": [1], "lbl": 2}\n'),
      "q.jsonl:2: unknown 'target_ind', 'lbl'; known are uid, title, content",
    ),
    (_write("q.jsonl", '{"title": "a"}\n\n{"uid": "b"}\n'), "q.jsonl:3: has no 'title'"),
    (_write("q.jsonl", '{"title": "a"}\n["b"]\n'), "q.jsonl:2: must be a text or an object with 'title', not list"),
    (_write("q.jsonl", b'{"title": "\xff"}\n'), "q.jsonl:1: not valid JSON in UTF-8"),
    (_write("q.jsonl", "\n"), "q.jsonl: has no queries"),
    (_cut("q.jsonl"), r"q.jsonl:31: not valid JSON .*truncated"),
    (_write("q.csv", "title,color\na,b\n"), "q.csv:1: unknown 'color'"),
    (_write("q.csv", "uid,content\na,b\n"), "q.csv:1: has no 'title'"),
    (_write("q.csv", "title,title\na,b\n"), "q.csv:1: has two columns 'title'"),
    (_write("q.csv", "title,content\na,b\nc\n"), "q.csv:3: has 1 cells for 2 columns; is the file truncated"),
    (_write("q.csv", 'title,content\na,b\nc,"d\n'), "q.csv:3: not valid CSV .*truncated"),
    (_write("q.csv", "title,deny\na,[1\n"), "q.csv:2: 'deny': not valid JSON"),
    (_write("q.csv", ""), "q.csv: is empty"),
    (_write("q.csv", "title\n"), "q.csv: has no queries"),
    (_cut("q.parquet"), "q.parquet: cannot be read as Parquet .*truncated"),
    (_with_a_hidden_page, r"q.parquet: cannot be read as Parquet \(its pages have 0 of the .* rows of its footer"),
    (_table(title=["a"], color=["b"]), "q.parquet: unknown 'color'"),
    (_table(title=[1]), "q.parquet: column 'title' is int64; it must be string"),
    (_table(title=["a"], images=["b"]), "column 'images' is string; it must be a list of binary, string or lists"),
    (_table(title=["a", None]), "q.parquet: row 1: has no 'title'"),
    (_write("q.txt", "a"), "q.txt: files of queries end in .jsonl, .csv, .parquet"),
    (lambda folder, queries: folder / "none.jsonl", "none.jsonl: no such file"),
    (_write("q.jsonl", '{"title": "a", "allow": ["label/nothing"]}\n'), "label/nothing"),
  ],
)
def test_errors_in_a_file_of_queries_name_the_line(predictor, queries, tmp_path, write, message):
  path = write(tmp_path, queries)
  with pytest.raises(InputError, match=message) as error:
    answer(predictor, path, tmp_path / "top.jsonl")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "top.jsonl").exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path):
  queries = tmp_path / "q.jsonl"
  queries.write_text("{}")
  for output, message in (
    (tmp_path / "top.txt", "top.txt: files of predictions end in .jsonl, .csv, .parquet"),
    (tmp_path / "none" / "top.csv", "none: no such folder"),
    (queries, "q.jsonl: is the file of queries"),
  ):
    with pytest.raises(InputError, match=message):
      prepare_output(str(output), queries)


def test_the_command_answers_a_file_and_refuses_bad_flags(texts_only, tmp_path):
  text = "title,deny\narrow up,label/3;label/4\ncloud,\n"
  (tmp_path / "q.csv").write_text(text)
  flags = ["predict", f"--workdir={texts_only.workdir}", f"--queries={tmp_path / 'q.csv'}"]
  bad = {"k": "--k=0", "mesh": "--mesh=3", "lambda": "--retrieval_lambda=2", "output": f"--output={tmp_path}"}
  commands = {
    name: [*flags, f"--output={tmp_path / name}.jsonl", "--retrieval_augmented", flag] for name, flag in bad.items()
  }
  commands |= {"good": [*flags, f"--output={tmp_path / 'top.jsonl'}", "--k=3"], "nothing": ["predict"]}
  commands["all"] = [*flags, f"--output={tmp_path / 'all.jsonl'}", "--k=25"]
  done = run_commands(commands, tmp_path)
  status, stdout, stderr = done.pop("good")
  assert status == 0, stderr
  assert "predictions for 2 queries" in stdout and "encode: first batch" in stdout and "queries/s" in stdout
  status, _, stderr = done.pop("all")
  assert status == 0 and "k=25: there are 24 labels" in stderr
  assert [len(labels) for _, labels in read_answers(tmp_path / "all.jsonl").values()] == [22, 24]
  found = read_answers(tmp_path / "top.jsonl")
  wanted = load_predictor(texts_only.workdir).predict(
    [{"title": "arrow up", "deny": ["label/3", "label/4"]}, "cloud"], 3
  )
  assert [[label[1] for label in labels] for _, labels in found.values()] == [[x.id for x in row] for row in wanted]
  for name, (status, stdout, stderr) in done.items():
    assert status == 1 and not stdout and len([x for x in stderr.splitlines() if x.startswith("error: ")]) == 1, (
      name,
      stderr,
    )
  assert "--k=0: 0 is not a positive integer" in done["k"][2]
  assert "--workdir" in done["nothing"][2] and Path(tmp_path / "q.csv").read_text() == text
