"""The readers of raw queries, labels and filters: rows, and one line with file and line number for bad input."""

import gzip
import json
import logging

import numpy as np
import pytest

from vixml_jax.datasets import raw_records
from vixml_jax.errors import InputError

QUERY = {"uid": "q", "title": "red shoe", "content": "", "target_ind": [2, 0], "target_rel": [1.0, 0.5]}
LABEL = {"uid": "l", "title": "shoe", "content": ""}


def _gzip(path, *lines):
  text = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
  path.write_bytes(gzip.compress(text + b"\n"))
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / "trn.json.gz"


def _queries(path, num_labels=3):
  data_warnings = raw_records.DataWarnings()
  return list(raw_records.read_queries(path, num_labels, data_warnings)), data_warnings.messages()


def _labels(path):
  data_warnings = raw_records.DataWarnings()
  return list(raw_records.read_labels(path, data_warnings)), data_warnings.messages()


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
def test_text_beyond_latin_1_is_kept_raw_and_escaped(path, title):
  row = {**QUERY, "title": title}
  _gzip(path, row, json.dumps(row, ensure_ascii=False).encode())
  assert [row["title"] for row in _queries(path)[0]] == [title, title]


def test_byte_order_mark_and_windows_line_ends_are_accepted(path):
  line = json.dumps(QUERY).encode()
  _gzip(path, b"\xef\xbb\xbf" + line + b"\r", line + b"\r")
  assert len(_queries(path)[0]) == 2


def test_integer_uid_becomes_a_string(path):
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
    ({**QUERY, "uid": None}, "key 'uid' must be a string or an integer, found 'null'"),
    ({**QUERY, "title": ["a"]}, "key 'title' must be a string"),
    ({**QUERY, "content": 3}, "key 'content' must be a string"),
    ({**QUERY, "target_ind": "2 0"}, "key 'target_ind' must be a list of integers"),
    ({**QUERY, "target_ind": [2, 0.0]}, "key 'target_ind' must be a list of integers, but contains '0.0'"),
    ({**QUERY, "target_ind": [2, True]}, "key 'target_ind' must be a list of integers, but contains 'true'"),
    ({**QUERY, "target_rel": [1, None]}, "key 'target_rel' must be a list of numbers, but contains 'null'"),
    ({**QUERY, "target_rel": [1, float("inf")]}, "not finite"),
    ({**QUERY, "target_rel": [1, 1e39]}, "not finite in float32"),
    ({**QUERY, "target_rel": [1, 10**400]}, "not finite in float32"),
    (b'{"uid": ' + b"9" * 5000 + b"}", "malformed JSON, an integer has more than 4,300 digits"),
    (b'{"uid": "q", "title": "a", "title": "b"}', "malformed JSON, key 'title' occurs twice"),
    ({**QUERY, "target_ind": [2, 3]}, "target_ind has label 3, but labels are 0 to 2"),
    ({**QUERY, "target_ind": [-1, 2]}, "target_ind has label -1, but labels are 0 to 2"),
    ({**QUERY, "target_ind": [10**30, 2]}, f"target_ind has label {10**30}"),
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
def test_known_unusual_value_is_accepted_and_counted_with_its_first_line(path, row, message):
  rows, data_warnings = _queries(_gzip(path, QUERY, row, row))
  assert len(rows) == 3
  (counted,) = [line for line in data_warnings if message in line]
  assert counted.startswith(f"{path}: 2 rows with ") and counted.endswith("first at line 2")


def test_unusual_values_are_reported_once(path, caplog):
  data_warnings = raw_records.DataWarnings()
  list(raw_records.read_queries(_gzip(path, {**QUERY, "title": ""}), 3, data_warnings))
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


@pytest.mark.parametrize("read", [raw_records.count_rows, lambda path: _labels(path)])
def test_truncated_gzip_is_named(path, read):
  rng = np.random.default_rng(0)
  rows = [{**LABEL, "uid": str(i), "title": rng.bytes(20).hex()} for i in range(200)]
  whole = _gzip(path, *rows).read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match=r"trn.json.gz:\d+: the gzip file is truncated") as caught:
    read(path)
  line = int(str(caught.value).split("trn.json.gz:")[1].split(":")[0])
  assert 50 < line < 150


@pytest.mark.parametrize("read", [raw_records.count_rows, lambda path: _labels(path)])
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
  assert raw_records.count_rows(path) == rows


def _filter(path, text, num_rows=4, num_labels=3):
  path.write_bytes(text)
  return [row.tolist() for row in map(raw_records.read_filter(path, num_rows, num_labels).__getitem__, range(num_rows))]


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
    (b"1", "expected 'row label', two integers, but found '1'"),
    (b"1 2 3", "expected 'row label'"),
    (b"1,2", "expected 'row label'"),
    (b"1 -2", "expected 'row label'"),
    (b"1 1.0", "expected 'row label'"),
    (b"\xff\xfe1 2", "expected 'row label'"),
    (b"1" * 5000 + b" 2", "expected 'row label'"),
    (b"4 0", "row 4 is out of range, the split has rows 0 to 3"),
    (b"0 3", "label 3 is out of range, labels are 0 to 2"),
  ],
)
def test_bad_filter_line_is_named(tmp_path, line, message):
  path = tmp_path / "filter_labels_test.txt"
  with pytest.raises(InputError, match=message) as caught:
    _filter(path, b"0 0\n" + line + b"\n")
  assert str(caught.value).startswith(f"{path}:2: ")
