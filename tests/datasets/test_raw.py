"""The raw readers: what they yield, and one line with file and line number for every kind of bad input."""

import gzip
import io
import json
import logging

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vixml_jax.datasets import raw
from vixml_jax.errors import InputError

QUERY = {"uid": "q", "title": "red shoe", "content": "", "target_ind": [2, 0], "target_rel": [1.0, 0.5]}
LABEL = {"uid": "l", "title": "shoe", "content": ""}


def _png(value=0):
  buffer = io.BytesIO()
  Image.new("L", (2, 2), value).save(buffer, "PNG")
  return buffer.getvalue()


def _gzip(path, *lines):
  text = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
  path.write_bytes(gzip.compress(text + b"\n"))
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / "trn.json.gz"


def _queries(path, num_labels=3):
  data_warnings = raw.DataWarnings()
  return list(raw.read_queries(path, num_labels, data_warnings)), data_warnings.messages()


def _labels(path):
  data_warnings = raw.DataWarnings()
  return list(raw.read_labels(path, data_warnings)), data_warnings.messages()


def _without(record, key):
  return {k: v for k, v in record.items() if k != key}


def test_query_row_keeps_text_and_the_order_of_its_targets(path):
  (row,), data_warnings = _queries(_gzip(path, QUERY))
  assert (row["uid"], row["title"], row["content"]) == ("q", "red shoe", "")
  np.testing.assert_array_equal(row["target_ind"], np.int32([2, 0]))
  np.testing.assert_array_equal(row["target_rel"], np.float32([1, 0.5]))
  assert row["target_ind"].dtype == np.int32 and row["target_rel"].dtype == np.float32
  assert not data_warnings


@pytest.mark.parametrize("title", ["Émile — 東京 \U0001f45f", "a\u2028b", "tab\tnul\x00"])
def test_text_above_latin_1_survives_raw_and_escaped(path, title):
  row = {**QUERY, "title": title}
  _gzip(path, row, json.dumps(row, ensure_ascii=False).encode())
  assert [row["title"] for row in _queries(path)[0]] == [title, title]


def test_byte_order_mark_and_windows_line_ends_are_taken(path):
  line = json.dumps(QUERY).encode()
  _gzip(path, b"\xef\xbb\xbf" + line + b"\r", line + b"\r")
  assert len(_queries(path)[0]) == 2


def test_whole_number_uid_becomes_text(path):
  assert _queries(_gzip(path, {**QUERY, "uid": 7}))[0][0]["uid"] == "7"


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"uid": "q", ', "malformed JSON, Expecting property name"),
    (b"[" * 100_000, "malformed JSON, nested too deep"),
    (b"[1, 2]", "expected a JSON object"),
    (b"", "empty line; delete it"),
    ('{"uid": "é"}'.encode("latin-1"), "not UTF-8 \\(byte 0xe9 at column 10\\)"),
    (_without(QUERY, "uid"), "key 'uid' is missing; found title, content"),
    (_without(QUERY, "title"), "key 'title' is missing"),
    (_without(QUERY, "target_ind"), "key 'target_ind' is missing"),
    (_without(QUERY, "target_rel"), "key 'target_rel' is missing"),
    ({**QUERY, "uid": None}, "key 'uid' must be text or a whole number, found 'null'"),
    ({**QUERY, "title": ["a"]}, "key 'title' must be text"),
    ({**QUERY, "content": 3}, "key 'content' must be text"),
    ({**QUERY, "target_ind": "2 0"}, "key 'target_ind' must be a list of whole numbers"),
    ({**QUERY, "target_ind": [2, 0.0]}, "key 'target_ind' must hold whole numbers, found '0.0'"),
    ({**QUERY, "target_ind": [2, True]}, "key 'target_ind' must hold whole numbers, found 'true'"),
    ({**QUERY, "target_rel": [1, None]}, "key 'target_rel' must hold numbers, found 'null'"),
    ({**QUERY, "target_rel": [1, float("inf")]}, "not finite"),
    ({**QUERY, "target_ind": [2, 3]}, "names label 3, but there are labels 0 to 2"),
    ({**QUERY, "target_ind": [-1, 2]}, "names label -1, but there are labels 0 to 2"),
    ({**QUERY, "target_ind": [10**30, 2]}, f"names label {10**30}"),
    ({**QUERY, "target_rel": [1.0]}, "target_ind has 2 entries and target_rel 1"),
  ],
)
def test_bad_row_is_named_by_file_and_line(path, line, message):
  _gzip(path, QUERY, QUERY, line, QUERY)
  with pytest.raises(InputError, match=message) as caught:
    _queries(path)
  assert str(caught.value).startswith(f"{path}:3: ")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({**QUERY, "title": " "}, "an empty title"),
    ({**QUERY, "target_ind": [], "target_rel": []}, "no labels"),
    ({**QUERY, "target_ind": [1, 1], "target_rel": [1, 1]}, "repeated labels in target_ind"),
    (_without(QUERY, "content"), "no key 'content'"),
    (
      b'{"uid": "q", "title": "a \\ud83d b", "content": "", "target_ind": [], "target_rel": []}',
      "half a surrogate pair",
    ),
  ],
)
def test_known_oddity_is_taken_and_counted_with_its_first_line(path, row, message):
  rows, data_warnings = _queries(_gzip(path, QUERY, row, row))
  assert len(rows) == 3
  (counted,) = [oddity for oddity in data_warnings if message in oddity]
  assert counted.startswith(f"{path}: 2 rows with ") and counted.endswith("first at line 2")


def test_oddities_are_reported_once(path, caplog):
  data_warnings = raw.DataWarnings()
  list(raw.read_queries(_gzip(path, {**QUERY, "title": ""}), 3, data_warnings))
  with caplog.at_level(logging.WARNING):
    data_warnings.report()
    data_warnings.report()
  assert caplog.messages == [f"{path}: 1 row with an empty title, first at line 1"]


def test_repeated_target_keeps_its_first_relevance(path):
  row = {**QUERY, "target_ind": [1, 0, 1], "target_rel": [0.25, 1, 0.75]}
  (row,), _ = _queries(_gzip(path, row))
  assert row["target_ind"].tolist() == [1, 0] and row["target_rel"].tolist() == [0.25, 1]


def test_half_a_surrogate_pair_becomes_the_replacement_character(path):
  _gzip(path, b'{"uid": "q", "title": "a\\ud83d\\ud83d\\ude00b", "content": ""}')
  (row,), _ = _labels(path)
  assert row["title"].startswith("a\ufffd") and row["title"].endswith("\U0001f600b")


def test_label_whose_uid_repeats_is_named_with_the_line_of_the_first(path):
  _gzip(path, LABEL, {**LABEL, "uid": "m"}, {**LABEL, "uid": "m"}, LABEL)
  with pytest.raises(InputError, match="same uid as line 2") as caught:
    _labels(path)
  assert str(caught.value).startswith(f"{path}:3: ")


def test_labels_may_share_a_title(path):
  assert len(_labels(_gzip(path, LABEL, {**LABEL, "uid": "m"}))[0]) == 2


@pytest.mark.parametrize("read", [raw.count_rows, lambda path: _labels(path)])
def test_truncated_gzip_is_named(path, read):
  rng = np.random.default_rng(0)
  rows = [{**LABEL, "uid": str(i), "title": rng.bytes(20).hex()} for i in range(200)]
  whole = _gzip(path, *rows).read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match=r"trn.json.gz:\d+: the gzip file is truncated") as caught:
    read(path)
  line = int(str(caught.value).split("trn.json.gz:")[1].split(":")[0])
  assert 50 < line < 150


@pytest.mark.parametrize("read", [raw.count_rows, lambda path: _labels(path)])
def test_damaged_and_plain_files_are_named(path, read):
  whole = bytearray(_gzip(path, *[{**LABEL, "uid": str(i)} for i in range(50)]).read_bytes())
  whole[len(whole) // 2] ^= 0xFF
  path.write_bytes(whole)
  with pytest.raises(InputError, match="truncated or damaged"):
    read(path)
  path.write_text(json.dumps(LABEL))
  with pytest.raises(InputError, match="trn.json.gz:1: not a gzip file"):
    read(path)


@pytest.mark.parametrize(("text", "rows"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\nb", 2)])
def test_rows_are_counted_with_and_without_a_last_newline(path, text, rows):
  path.write_bytes(gzip.compress(text))
  assert raw.count_rows(path) == rows


def _filter(path, text, num_rows=4, num_labels=3):
  path.write_bytes(text)
  return [row.tolist() for row in map(raw.read_filter(path, num_rows, num_labels).__getitem__, range(num_rows))]


@pytest.mark.parametrize(
  ("text", "rows"),
  [
    (b"", [[], [], [], []]),
    (b"2 1", [[], [], [1], []]),
    (b"3 2\n0 2\n0 1\n", [[1, 2], [], [], [2]]),
    (b"1 0 \r\n\n1\t0\n1 2\n", [[], [0, 2], [], []]),
  ],
)
def test_filter_file_of_any_length_and_order_is_read(tmp_path, text, rows):
  assert _filter(tmp_path / "filter.txt", text) == rows


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"1", "expected 'row label', two whole numbers, but found '1'"),
    (b"1 2 3", "expected 'row label'"),
    (b"1,2", "expected 'row label'"),
    (b"1 -2", "expected 'row label'"),
    (b"1 1.0", "expected 'row label'"),
    (b"\xff\xfe1 2", "expected 'row label'"),
    (b"4 0", "row 4 is out of range, the split has rows 0 to 3"),
    (b"0 3", "label 3 is out of range, there are labels 0 to 2"),
  ],
)
def test_bad_filter_line_is_named(tmp_path, line, message):
  path = tmp_path / "filter_labels_test.txt"
  with pytest.raises(InputError, match=message) as caught:
    _filter(path, b"0 0\n" + line + b"\n")
  assert str(caught.value).startswith(f"{path}:2: ")


@pytest.fixture
def folder(tmp_path):
  for name in ("trn", "tst", "lbl"):
    _gzip(tmp_path / f"{name}.json.gz", QUERY if name != "lbl" else LABEL)
  for split in ("train", "test"):
    (tmp_path / f"filter_labels_{split}.txt").touch()
  return tmp_path


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("trn.json.gz", "missing; the folder must hold trn.json.gz, tst.json.gz, lbl.json.gz"),
    ("lbl.json.gz", "missing; the folder must hold"),
    ("filter_labels_train.txt", "missing; .* make an empty file if there are none"),
    ("filter_labels_test.txt", "missing"),
  ],
)
def test_missing_file_is_named_with_what_to_do(folder, name, message):
  raw.check_folder(folder)
  (folder / name).unlink()
  with pytest.raises(InputError, match=message) as caught:
    raw.check_folder(folder)
  assert str(caught.value).startswith(f"{folder / name}: ")


def test_missing_folder_is_named(tmp_path):
  with pytest.raises(InputError, match="no such folder; set --config.dataset.raw_dir"):
    raw.check_folder(tmp_path / "nowhere")


def _images(path, columns, num_rows=4):
  pq.write_table(pa.table(columns), path)
  return list(raw.read_images(path, num_rows))


@pytest.mark.parametrize("column", ["png", "image"])
def test_images_come_by_row_with_their_slots_and_bytes(tmp_path, column):
  first, second, third = _png(1), _png(2), _png(3)
  columns = {column: [first, second, third], "slot": [0, 2, 1], "row": [1, 1, 3]}
  assert _images(tmp_path / "trn_images.parquet", columns) == [
    ([], []),
    ([0, 2], [first, second]),
    ([], []),
    ([1], [third]),
  ]


def test_set_without_images_yields_empty_lists(tmp_path):
  assert list(raw.read_images(tmp_path / "trn_images.parquet", 2)) == [([], []), ([], [])]


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ({"row": [0], "slot": [0], "jpeg": [_png()]}, "columns must be row, slot, png; found"),
    ({"row": [0, 4], "slot": [0, 0], "png": [_png()] * 2}, "record 1: row 4, slot 0 is out of range"),
    ({"row": [0, 0], "slot": [0, -1], "png": [_png()] * 2}, "record 1: row 0, slot -1 is out of"),
    ({"row": [1, 0], "slot": [0, 0], "png": [_png()] * 2}, "record 1: row 0, slot 0 comes after row"),
    ({"row": [1, 1], "slot": [0, 0], "png": [_png()] * 2}, "sort the file by row, slot"),
    ({"row": [0, 1], "slot": [0, 0], "png": [_png(), b"x"]}, "record 1: row 1, slot 0 is no PNG"),
    ({"row": [0], "slot": [0], "png": ["text"]}, "record 0: row and slot must be whole numbers"),
    ({"row": [0, None], "slot": [0, 0], "png": [_png()] * 2}, "record 1: row and slot"),
  ],
)
def test_bad_image_record_is_named(tmp_path, columns, message):
  path = tmp_path / "trn_images.parquet"
  with pytest.raises(InputError, match=message) as caught:
    _images(path, columns)
  assert str(caught.value).startswith(f"{path}: ")


def test_image_file_that_is_no_parquet_is_named(tmp_path):
  path = tmp_path / "trn_images.parquet"
  path.write_bytes(b"PAR1 not really")
  with pytest.raises(InputError, match="not a readable parquet file"):
    list(raw.read_images(path, 1))
