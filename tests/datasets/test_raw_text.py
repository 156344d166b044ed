"""The reader of text rows and their matrix: rows, and one line with file and line number for bad input."""

import numpy as np
import pytest

from vixml_jax.datasets import raw_text
from vixml_jax.datasets.raw_records import DataWarnings
from vixml_jax.errors import InputError


def _read(folder, text, matrix, num_labels=4):
  rows, targets, data_warnings = folder / "train.raw.txt", folder / "trn_X_Y.txt", DataWarnings()
  rows.write_bytes(text)
  targets.write_bytes(matrix)
  found = raw_text.read_queries(rows, targets, raw_text.count_rows(rows), num_labels, data_warnings)
  return list(found), data_warnings.messages()


def _labels(folder, text):
  path, data_warnings = folder / "label.raw.txt", DataWarnings()
  path.write_bytes(text)
  return [(row["uid"], row["title"]) for row in raw_text.read_labels(path, data_warnings)], data_warnings.messages()


@pytest.mark.parametrize("last", [b"", b"\n"])
def test_rows_have_uid_title_and_positives(tmp_path, last):
  text = b"B01->red shoe\nB02->a->b\r\nB03->socks" + last
  rows, messages = _read(tmp_path, text, b"3 4\n2:1.0 0:0.5\n\n3:1" + last)
  assert [(row["uid"], row["title"], row["content"]) for row in rows] == [
    ("B01", "red shoe", ""),
    ("B02", "a->b", ""),
    ("B03", "socks", ""),
  ]
  assert [row["target_ind"].tolist() for row in rows] == [[2, 0], [], [3]]
  assert [row["target_rel"].tolist() for row in rows] == [[1.0, 0.5], [], [1.0]]
  assert rows[1]["target_ind"].dtype == np.int32 and rows[1]["target_rel"].dtype == np.float32
  assert [message.split(": ", 1)[1] for message in messages] == ["1 row with no labels, first at line 3"]


def test_text_is_latin_1_and_split_at_newlines_only(tmp_path):
  title = "Caf\xe9 \x85 na\xefve \xbd\x0c"
  rows, messages = _labels(tmp_path, f"1->{title}\n2->x\n".encode("latin-1"))
  assert rows == [("1", title), ("2", "x")]
  assert not messages


def test_titles_that_look_like_utf_8_are_counted(tmp_path):
  rows, (message,) = _labels(tmp_path, "1->plain\n2->Caf\xe9\n".encode())
  assert rows[1] == ("2", "Caf\xc3\xa9")
  assert "1 row with a title that looks like UTF-8 (read as latin-1" in message and message.endswith("line 2")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (b"1->a\nno arrow\n", "label.raw.txt:2: expected 'uid->title', but found 'no arrow'"),
    (b"1->a\n->title\n", "label.raw.txt:2: expected 'uid->title'"),
    (b"1->a\n\n3->b\n", "label.raw.txt:2: expected 'uid->title', but found ''"),
    (b"1->a\n2->b\n1->c\n", "label.raw.txt:3: the same uid as line 1"),
  ],
)
def test_bad_text_line_is_named(tmp_path, text, message):
  with pytest.raises(InputError, match=message):
    _labels(tmp_path, text)


@pytest.mark.parametrize(
  ("matrix", "message"),
  [
    (b"", r":1: the header must be '2 4'"),
    (b"2\n0:1\n1:1\n", r":1: the header must be '2 4', .* but is '2'"),
    (b"2 5\n0:1\n1:1\n", r":1: the header must be '2 4'"),
    (b"3 4\n0:1\n1:1\n0:1\n", r":1: the header must be '2 4'"),
    (b"0:1\n1:1\n", r":1: the header must be '2 4'"),
    (b"2 4\n0:1\n", r":3: the file ends after 1 of 2 rows"),
    (b"2 4\n0:1\n1:1\n2:1\n", r":4: more rows than the 2 of the header"),
    (b"2 4\n0:1\n1\n", r":3: expected 'label:relevance label:relevance ...', but found '1'"),
    (b"2 4\n0:1\n1:x\n", r":3: expected 'label:relevance"),
    (b"2 4\n0:1\n1.5:1\n", r":3: expected 'label:relevance"),
    (b"2 4\n0:1\n+1:1\n", r":3: expected 'label:relevance .* but found '\+1:1'"),
    (b"2 4\n0:1\n-0:1\n", r":3: expected 'label:relevance"),
    (b"2 4\n0:1\n1_0:1\n", r":3: expected 'label:relevance"),
    (b"2 4\n0:1\n1:1:1\n", r":3: expected 'label:relevance"),
    (b"2 4\n0:1\n4:1\n", r":3: the row has label 4, but labels are 0 to 3"),
    (b"2 4\n0:1\n-1:1\n", r":3: the row has label -1"),
    (b"2 4\n0:1\n1:nan\n", r":3: the row has a number that is not finite"),
  ],
)
def test_bad_matrix_is_named_by_file_and_line(tmp_path, matrix, message):
  with pytest.raises(InputError, match=rf"trn_X_Y.txt{message}"):
    _read(tmp_path, b"1->a\n2->b\n", matrix)


def test_repeated_label_of_a_row_keeps_its_first_relevance(tmp_path):
  rows, messages = _read(tmp_path, b"1->a\n", b"1 4\n2:0.5 1:1 2:1\n")
  assert rows[0]["target_ind"].tolist() == [2, 1] and rows[0]["target_rel"].tolist() == [0.5, 1.0]
  assert "1 row with repeated labels in the row" in messages[0]
