"""Filters made from uids equal those worked out by hand; empty filter files are refused where queries are labels."""

import logging

import pytest

from benchmarks import make_filters
from tests.helpers import miniature
from vixml_jax import datasets
from vixml_jax.datasets import filters, raw, raw_rows
from vixml_jax.errors import InputError

LABELS = ["A", "B", "C", "D", "E"]
# uid -> its labels. Train: A and B are labels, X is not. Test: C, D and B are labels, Y is not.
TRAIN = {"A": ["C", "D"], "X": ["C", "A"], "B": ["C"], "D": [], "E": ["E", "C"]}
TEST = {"C": ["A"], "Y": ["C"], "D": ["E"], "B": ["D", "B"]}

# A query and the label with its uid.
TRAIN_FILTER = [["A"], [], ["B"], ["D"], ["E"]]
# C: itself; A, B and E, whose training queries have the label C. X has it too, but X is no label.
# D: itself; A, whose training query has the label D. B: itself only, no training query has the label B.
TEST_FILTER = [["A", "B", "C", "E"], [], ["A", "D"], ["B"]]


def _write(folder, labels=LABELS, train=TRAIN, test=TEST, title=lambda uid, split: f"product {uid}"):
  folder.mkdir(exist_ok=True)
  miniature.write_lines(
    folder / "lbl.json.gz", [{"uid": uid, "title": title(uid, "lbl"), "content": ""} for uid in labels]
  )
  for split, rows in (("trn", train), ("tst", test)):
    records = [
      {
        "uid": uid,
        "title": title(uid, split),
        "content": "",
        "target_ind": [labels.index(label) for label in targets],
        "target_rel": [1.0] * len(targets),
      }
      for uid, targets in rows.items()
    ]
    miniature.write_lines(folder / f"{split}.json.gz", records)
  return folder


def _load(folder, **options):
  files = raw.find_files(folder)
  counts = {split: raw_rows.count_rows(found) for split, found in files.items()}
  return filters.load_filters(files, counts, **options)


def _names(rows, labels=LABELS):
  return [[labels[label] for label in rows[row]] for row in range(len(rows))]


@pytest.mark.parametrize("rows_per_block", [1, 2, 8192])
def test_filters_are_those_worked_out_by_hand(tmp_path, monkeypatch, rows_per_block):
  monkeypatch.setattr(filters, "_ROWS_PER_BLOCK", rows_per_block)
  made = _load(_write(tmp_path / "raw"))
  assert _names(made.train) == TRAIN_FILTER
  assert _names(made.test) == TEST_FILTER
  assert made.metadata == {
    "source": "uids",
    "pairs": {"train": 4, "test": 7},
    "own": {"train": 4, "test": 3},
    "reverse": 4,
  }


def test_order_of_labels_does_not_matter(tmp_path):
  labels = ["E", "C", "A", "D", "B"]
  made = _load(_write(tmp_path / "raw", labels))
  assert [sorted(row) for row in _names(made.train, labels)] == TRAIN_FILTER
  assert [sorted(row) for row in _names(made.test, labels)] == TEST_FILTER


def test_made_filters_equal_the_same_pairs_in_files(tmp_path):
  """A prepared set has the same filters, whether its filter files were given or made."""
  made = datasets.prepare("custom", _write(tmp_path / "raw"), tmp_path / "made")
  folder = _write(tmp_path / "given")
  for name, rows in (("train", TRAIN_FILTER), ("test", TEST_FILTER)):
    pairs = [f"{row} {LABELS.index(label)}\n" for row, names in enumerate(rows) for label in names]
    (folder / f"filter_labels_{name}.txt").write_text("".join(reversed(pairs)))
  given = datasets.prepare("custom", folder, tmp_path / "given_data")
  for split in ("train", "test"):
    rows = [[row["filter_ind"].tolist() for row in builder.as_data_source(split)] for builder in (made, given)]
    assert rows[0] == rows[1]
  assert made.info.metadata["filters"]["source"] == "uids"
  assert given.info.metadata["filters"] == {"source": "files", "pairs": {"train": 4, "test": 7}}
  reopened = datasets.open_dataset("custom", tmp_path / "made").info.metadata["filters"]
  assert (reopened["pairs"]["test"], reopened["reverse"]) == (7, 4)
  assert sorted(made.info.metadata["sha256"]) == ["lbl.json.gz", "trn.json.gz", "tst.json.gz"]


def test_query_that_occurs_twice_gets_its_pairs_twice(tmp_path):
  folder = _write(tmp_path / "raw")
  lines = miniature.read_lines(folder / "tst.json.gz")
  miniature.write_lines(folder / "tst.json.gz", [*lines, lines[0]])
  lines = miniature.read_lines(folder / "trn.json.gz")
  miniature.write_lines(folder / "trn.json.gz", [*lines, lines[0]])
  made = _load(folder)
  assert _names(made.test) == [*TEST_FILTER, TEST_FILTER[0]]
  assert _names(made.train) == [*TRAIN_FILTER, ["A"]]


def test_sets_whose_queries_are_no_labels_have_nothing_to_remove(tmp_path, caplog):
  folder = _write(tmp_path / "raw", train={"q1": ["A"], "q2": []}, test={"q1": ["B"]})
  with caplog.at_level(logging.INFO):
    made = _load(folder)
  assert made.metadata["source"] == "none" and made.metadata["pairs"] == {"train": 0, "test": 0}
  assert [len(made.train), len(made.test), len(made.test.values)] == [2, 1, 0]
  assert "no query has the uid of a label: no label is removed" in caplog.text


def test_log_says_which_filters_are_used_and_how_many_pairs(tmp_path, caplog):
  folder = _write(tmp_path / "raw")
  with caplog.at_level(logging.INFO):
    _load(folder)
    assert "made from the uids: own label of 4 training and 3 test queries, and 4 reverse pairs" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    caplog.clear()
    (folder / "filter_labels_train.txt").write_text("0 0\n2 1\n")
    (folder / "filter_labels_test.txt").write_text("0 2\n")
    made = _load(folder)
  assert f"filters: read from {folder / 'filter_labels_train.txt'} (2 pairs) and" in caplog.text
  assert _names(made.train) == [["A"], [], ["B"], [], []], "given files win"


def test_uids_that_are_row_numbers_are_warned_about(tmp_path, caplog):
  folder = _write(tmp_path / "raw", title=lambda uid, split: f"{split} {uid}")
  _load(folder)
  (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
  assert warning.startswith("7 of the 7 queries with the uid of a label have another title than that label")


@pytest.mark.parametrize(("empty", "row", "label"), [("train", 0, 0), ("test", 0, 2)])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_filter_is_refused_where_queries_are_labels(tmp_path, empty, row, label, content):
  folder = _write(tmp_path / "raw")
  for split in ("train", "test"):
    (folder / f"filter_labels_{split}.txt").write_text(content if split == empty else "0 0\n")
  message = (
    rf"filter_labels_{empty}.txt: has no pairs, but row {row} of \w+.json.gz has the uid of label {label}: .* delete "
    r"both filter files, .* or set --config.dataset.allow_empty_filter=True"
  )
  with pytest.raises(InputError, match=message):
    datasets.prepare("custom", folder, tmp_path / "data")
  assert not list((tmp_path / "data" / "custom").iterdir())
  builder = datasets.prepare("custom", folder, tmp_path / "data", allow_empty_filter=True)
  assert builder.info.metadata["filters"]["pairs"][empty] == 0


def test_empty_filter_is_accepted_where_no_query_is_a_label(tmp_path):
  folder = _write(tmp_path / "raw", train={"q1": ["A"]}, test={"q2": ["B"]})
  for split in ("train", "test"):
    (folder / f"filter_labels_{split}.txt").touch()
  assert _load(folder).metadata == {"source": "files", "pairs": {"train": 0, "test": 0}}


def test_integer_uids_match_strings(tmp_path):
  folder = _write(tmp_path / "raw", ["7", "8"], {"x": ["7"]}, {"8": ["7"]})
  lines = miniature.read_lines(folder / "tst.json.gz")
  lines[0]["uid"] = 8
  miniature.write_lines(folder / "tst.json.gz", lines)
  assert _names(_load(folder).test, ["7", "8"]) == [["8"]]


def test_benchmark_of_full_size_makes_filters(tmp_path):
  make_filters.write(tmp_path / "raw", scale=1e-4)
  measured = make_filters.measure(tmp_path / "raw")
  assert 0 < measured["train_pairs"] < 224 and measured["test_pairs"] > 97
