"""Each mistake in a table is one line that names the file, the line and the column, and nothing is written."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.damage import hide_a_page
from vixml_jax.errors import InputError
from vixml_jax.tables import Columns, write_raw_folder

_GOOD = "text,labels\nwool socks,socks|wool\nrain boots,boots\n"


def _utf16(text):
  return text.encode("utf-16")


def _parquet(folder, rows, **columns):
  table = pa.Table.from_pylist(rows) if rows else pa.table(columns)
  pq.write_table(table, folder / "t.parquet")
  return folder / "t.parquet"


# Name -> name of the file, its contents, further arguments, and what the message must have.
_FILES = {
  "no such file": (None, "", {}, ["t.csv: no such file"]),
  "unknown kind of file": ("t.xlsx", "x", {}, ["t.xlsx", ".csv", ".parquet"]),
  "empty file": ("t.csv", "", {}, ["t.csv: is empty"]),
  "header only": ("t.csv", "text,labels\n", {}, ["t.csv: has no rows"]),
  "two columns with the same name": ("t.csv", "text,text\na,b\n", {}, ["t.csv:1: has two columns 'text'"]),
  "missing column": ("t.csv", _GOOD, dict(columns=Columns(text="name")), ["'name'", "--text_column", "'labels'"]),
  "two roles of a column": ("t.csv", _GOOD, dict(columns={"text": "text", "uid": "text"}), ["--uid_column", "'text'"]),
  "two possible texts": ("t.csv", "title,text,labels\na,b,c\n", {}, ["'title' or 'text'", "--text_column"]),
  "no possible text": ("t.csv", "x,y,labels\na,b,c\n", {}, ["--text_column", "'x', 'y', 'labels'"]),
  "no possible labels": ("t.csv", "text,x\na,b\n", {}, ["--label_column", "'text', 'x'"]),
  "text switched off": ("t.csv", _GOOD, dict(columns=Columns(text="")), ["--text_column: must name a column"]),
  "ragged line": ("t.csv", _GOOD + "a,b,c\n", {}, ["t.csv:4: has 3 cells for 2 columns"]),
  "line breaks in cells": ("t.csv", 'text,labels\n"a\n\nb",c\n,d\n', {}, ["t.csv:5, column 'text': is empty"]),
  "quote that is not closed": ("t.csv", _GOOD + '"a,b\nc,d\n', {}, ["t.csv:4: not valid CSV"]),
  "broken UTF-8": ("t.csv", _GOOD.encode() + b"caf\xe9,b\n", {}, ["t.csv:4: not UTF-8", "0xe9", "byte 4"]),
  "UTF-16": ("t.csv", _utf16(_GOOD), {}, ["t.csv:1: not UTF-8"]),
  "NUL character": ("t.csv", _GOOD + "a\0b,c\n", {}, ["t.csv:4, column 'text'", "NUL"]),
  "truncated gzip": ("t.csv.gz", gzip.compress(_GOOD.encode() * 99)[:-9], {}, ["t.csv.gz", "truncated"]),
  "no gzip": ("t.csv.gz", _GOOD, {}, ["t.csv.gz", "not a gzip file"]),
  "empty text": ("t.csv", _GOOD + '"  ",b\n', {}, ["t.csv:4, column 'text': is empty"]),
  "no labels": ("t.csv", _GOOD + "a,\n", {}, ["t.csv:4, column 'labels': has no labels"]),
  "empty label": ("t.csv", _GOOD + "a,b||c\n", {}, ["t.csv:4, column 'labels': has an empty name"]),
  "two separators": (
    "t.csv",
    _GOOD + 'a,"b,c"\n',
    {},
    ["column 'labels'", "'|'", "','", "t.csv:2", "t.csv:4", "--label_separator"],
  ),
  "some JSON lists": ("t.csv", "text,labels\na,[1]\nb,c\n", {}, ["column 'labels'", "JSON", "--label_separator"]),
  "Python lists": ("t.csv", "text,labels\na,['b']\nb,['c']\n", {}, ["t.csv:2, column 'labels'", '["a", "b"]']),
  "broken JSON line": ("t.jsonl", '{"text": "a", "labels": ["b"]}\n{"text":\n', {}, ["t.jsonl:2: not valid JSON"]),
  "no JSON object": ("t.jsonl", '["a"]\n', {}, ["t.jsonl:1: must be a JSON object"]),
  "number as text": (
    "t.jsonl",
    '{"text": "a", "labels": ["b"]}\n{"text": 1, "labels": ["b"]}\n',
    dict(columns=Columns(text="text")),
    ["t.jsonl:2, column 'text': must be a text, not int"],
  ),
  "list in labels": (
    "t.jsonl",
    '{"text": "a", "labels": [["b"]]}\n{"text": "c", "labels": []}\n',
    {},
    ["t.jsonl:1, column 'labels'", "list"],
  ),
  "half a surrogate pair": ("t.jsonl", '{"text": "\\ud800", "labels": ["b"]}\n', {}, ["t.jsonl:1, column 'text'"]),
  "duplicate uid": ("t.csv", "id,text,labels\n1,a,b\n2,c,d\n3,x,b\n2,y,d\n", {"separator": ""}, ["t.csv:5", "t.csv:3"]),
  "too few numbers": (
    "t.csv",
    "text,labels,relevance\na,b|c,1\nb,c,1\n",
    {},
    ["t.csv:2, column 'relevance'", "1 numbers"],
  ),
  "relevance is not finite": ("t.csv", "text,labels,relevance\na,b,nan\nb,c,1\n", {}, ["t.csv:2, column 'relevance'"]),
  "unknown split": ("t.csv", "text,labels,split\na,b,train\nb,c,later\n", {}, ["t.csv:3, column 'split'", "'later'"]),
  "no test row": ("t.csv", "text,labels,split\na,b,train\nb,c,train\n", {}, ["no row is for testing"]),
  "the same text in all rows": ("t.csv", "text,labels\na b,c\nb a,d\n", {}, ["nearly the same", "--test_data"]),
  "one row": ("t.csv", "text,labels\na b,c\n", {}, ["--test_data"]),
  "test fraction": ("t.csv", _GOOD, dict(test_fraction=1.0), ["--test_fraction=1.0"]),
  "URL of an image": (
    "t.csv",
    "text,labels,image\na,b,\nb,c,https://x/y.png\n",
    {},
    ["t.csv:3, column 'image'", "img2dataset"],
  ),
  "no such image": (
    "t.csv",
    "text,labels,image\na,b,\nb,c,no.png\n",
    {},
    ["t.csv:3, column 'image'", "no.png", "No such file"],
  ),
  "no image": ("t.csv", "text,labels,image\na,b,\nb,c,t.csv\n", {}, ["t.csv:3, column 'image'", "is not a PNG"]),
}


@pytest.mark.parametrize("name", _FILES)
def test_a_mistake_in_a_file_is_one_line(name, tmp_path):
  file, contents, settings, words = _FILES[name]
  if file:
    (tmp_path / file).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
  _fails(tmp_path / (file or "t.csv"), tmp_path, words, **settings)


def _fails(data, tmp_path, words, **settings):
  with pytest.raises(InputError) as error:
    write_raw_folder(data, tmp_path / "raw", **settings)
  message = str(error.value)
  assert "\n" not in message and len(message) < 400 + len(str(tmp_path)) * 2, message
  for word in words:
    assert word in message, message
  assert sorted(path.name for path in tmp_path.glob("raw*")) in ([], ["raw.lock"])


_GOOD_ROWS = [{"text": "wool socks", "labels": ["socks"]}, {"text": "rain boots", "labels": ["boots"]}]
# Name -> rows, and what the message must have.
_ROWS = {
  "no rows": ([], ["the table", "no rows"]),
  "not dicts": (["a"], ["the table: row 0", "dict"]),
  "empty text": ([*_GOOD_ROWS, {"text": None, "labels": ["a"]}], ["the table: row 2, column 'text': is empty"]),
  "no labels": ([*_GOOD_ROWS, {"text": "b"}], ["the table: row 2, column 'labels': has no labels"]),
  "empty list": ([*_GOOD_ROWS, {"text": "b", "labels": []}], ["the table: row 2, column 'labels': has no labels"]),
  "empty label": (
    [*_GOOD_ROWS, {"text": "b", "labels": ["a", " "]}],
    ["the table: row 2, column 'labels'", "empty name"],
  ),
  "wrong type": ([*_GOOD_ROWS, {"text": "b", "labels": [1.5]}], ["the table: row 2, column 'labels'", "float"]),
  "bytes that are no image": (
    [row | {"image": b"GIF8"} for row in _GOOD_ROWS] + [{"text": "b", "labels": ["a"], "image": b"\0\1"}],
    ["the table: row 2, column 'image'", "2 bytes", "is not a PNG"],
  ),
}


@pytest.mark.parametrize("name", _ROWS)
def test_a_mistake_in_a_list_of_dicts_is_one_line(name, tmp_path):
  _fails(_ROWS[name][0], tmp_path, _ROWS[name][1])


def test_a_mistake_in_a_parquet_file_names_the_row(tmp_path):
  rows = [*_GOOD_ROWS, {"text": "", "labels": ["a"]}]
  _fails(_parquet(tmp_path, rows), tmp_path, ["t.parquet: row 2, column 'text': is empty"])


def test_a_column_of_another_type_is_named(tmp_path):
  path = _parquet(tmp_path, None, text=["a", "b"], labels=[1.5, 2.5])
  _fails(path, tmp_path, ["--label_column", "'text', 'labels'"])


def test_a_truncated_parquet_file_is_named(tmp_path):
  path = _parquet(tmp_path, _GOOD_ROWS)
  path.write_bytes(path.read_bytes()[:-20])
  _fails(path, tmp_path, ["t.parquet: cannot be read"])


def test_a_parquet_file_of_which_pyarrow_skips_a_page_is_named(tmp_path):
  path = _parquet(tmp_path, _GOOD_ROWS)
  hide_a_page(path)
  _fails(path, tmp_path, ["t.parquet: cannot be read (its pages have 0 of the 2 rows of its footer)"])


def test_another_object_is_refused(tmp_path):
  _fails({"text": ["a"]}, tmp_path, ["dict", "pyarrow.Table"])


def test_a_label_that_the_table_of_labels_lacks_names_row_and_column(tmp_path):
  (tmp_path / "labels.csv").write_text("uid,title\nsocks,warm socks\nwool,wool\n")
  (tmp_path / "t.csv").write_text(_GOOD)
  words = ["t.csv:3, column 'labels': label 'boots'", "column 'uid'", "labels.csv"]
  _fails(tmp_path / "t.csv", tmp_path, words, labels=tmp_path / "labels.csv")


@pytest.mark.parametrize(
  ("contents", "words"),
  [
    ("uid,title\na,b\na,c\n", ["labels.csv:3, column 'uid': 'a' is also in", "labels.csv:2"]),
    ("uid,title\na,b\nc,\n", ["labels.csv:3, column 'title': is empty"]),
    ("x,y\na,b\n", ["labels.csv", "uid, id, name or label"]),
  ],
)
def test_a_mistake_in_the_table_of_labels_names_its_row(contents, words, tmp_path):
  (tmp_path / "labels.csv").write_text(contents)
  (tmp_path / "t.csv").write_text(_GOOD)
  _fails(tmp_path / "t.csv", tmp_path, words, labels=tmp_path / "labels.csv")


# Name -> files, and what the message must have.
_FOLDERS = {
  "no tables": ({"readme.md": "x"}, ["has no table", "trn.json.gz"]),
  "several kinds": ({"a.csv": _GOOD, "b.tsv": _GOOD}, [".csv, .tsv"]),
  "a file of no split": ({"train.csv": _GOOD, "labels.csv": _GOOD}, ["labels.csv", "--labels_table"]),
  "other columns": ({"a.csv": _GOOD, "b.csv": "text,tags\na,b\n"}, ["b.csv: has no column 'labels'", "a.csv"]),
  "unknown split": ({"dataset_dict.json": json.dumps({"splits": ["train", "unsupervised"]})}, ["'unsupervised'"]),
  "no Arrow file": ({"state.json": json.dumps({"_data_files": [{"filename": "d.arrow"}]})}, ["d.arrow"]),
  "indices": ({"state.json": json.dumps({"_indices_data_files": [{"filename": "i"}]})}, ["flatten_indices"]),
  "damaged state": ({"state.json": "{"}, ["state.json", "JSON"]),
}


@pytest.mark.parametrize("name", _FOLDERS)
def test_a_mistake_in_a_folder_is_one_line(name, tmp_path):
  (tmp_path / "folder").mkdir()
  for file, contents in _FOLDERS[name][0].items():
    (tmp_path / "folder" / file).write_text(contents)
  _fails(tmp_path / "folder", tmp_path, _FOLDERS[name][1])
