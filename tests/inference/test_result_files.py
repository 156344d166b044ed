"""Files of predictions have the same bytes as if every prediction was written by itself."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vixml_jax.inference import result_files
from vixml_jax.inference.predictions import Prediction, PredictionColumns
from vixml_jax.inference.result_files import result_format

_LABELS = [("a/1", 3, "plain"), ('b "2", c', 7, "two\nlines \\ \u00e4\U0001f600\x07"), ("", 2**31 - 1, "")]
_COLUMNS = PredictionColumns(
  _LABELS,
  np.array([1, 0, 2, 1]),
  np.array([0.968274712562561, -1e-7, 1.0, 123456792.0], np.float32),
  np.array([2, 0, 1, 1]),
)
_UIDS = [None, "u, 1", 'u "2"', ""]
_ROWS = [
  [Prediction(*_LABELS[1], float(np.float32(0.968274712562561))), Prediction(*_LABELS[0], float(np.float32(-1e-7)))],
  [],
  [Prediction(*_LABELS[2], 1.0)],
  [Prediction(*_LABELS[1], 123456792.0)],
]
_NOTHING = PredictionColumns([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(4, np.int64))


def _write_one_by_one(path, rows):
  records = [
    {"row": row, "uid": uid, "predictions": [prediction._asdict() for prediction in found]}
    for row, (uid, found) in enumerate(zip(_UIDS, rows, strict=True), 5)
  ]
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
  elif path.suffix == ".parquet":
    pq.write_table(pa.Table.from_pylist(records, result_files._SCHEMA), path)
  else:
    with path.open("w", encoding="utf-8", newline="") as file:
      file.write("row,uid,rank,label,id,text,score\n")
      for record in records:
        for rank, found in enumerate(record["predictions"], 1):
          csv.writer(file, lineterminator="\n").writerow((record["row"], record["uid"], rank, *found.values()))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("columns,rows", [(_COLUMNS, _ROWS), (_NOTHING, [[]] * 4)], ids=["some", "none"])
def test_columns_are_written_like_single_predictions(tmp_path, suffix, columns, rows):
  assert columns.rows() == rows
  written, wanted = tmp_path / f"written{suffix}", tmp_path / f"wanted{suffix}"
  result_format(written).write(written, 5, _UIDS, columns)
  _write_one_by_one(wanted, rows)
  assert written.read_bytes() == wanted.read_bytes()


def test_scores_are_written_as_python_writes_them(tmp_path):
  rng = np.random.default_rng(0)
  scores = np.concatenate([rng.uniform(-1, 1, 3_000), 10.0 ** rng.uniform(-44, 38, 3_000), [0.0, -0.0, 1.0, 1e-4, 1e9]])
  scores = scores.astype(np.float32)
  found = PredictionColumns(_LABELS[:1], np.zeros(len(scores), np.int64), scores, np.array([len(scores)]))
  path = tmp_path / "top.csv"
  result_format(path).write(path, 0, [None], found)
  assert [line.rsplit(",", 1)[1] for line in path.read_text().splitlines()[1:]] == [repr(x) for x in scores.tolist()]
