"""Tables in all formats become the same raw folder, which the data sets of the package read."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vixml_jax.datasets.raw import SPLITS
from vixml_jax.tables import write_raw_folder

ROWS = [
  {"id": "a", "name": "wool socks", "tags": ["socks", "wool"], "split": "train"},
  {"id": "b", "name": 'rain "boots", black', "tags": ["boots"], "split": "train"},
  {"id": "c", "name": "hiking\nboots", "tags": ["boots", "outdoor"], "split": "train"},
  {"id": "d", "name": "écharpe", "tags": ["wool"], "split": "test"},
]
LABELS = ["socks", "wool", "boots", "outdoor"]
TRAIN = [("a", "wool socks", [0, 1]), ("b", 'rain "boots", black', [2]), ("c", "hiking\nboots", [2, 3])]
TEST = [("d", "écharpe", [1])]


def read_lines(path):
  """Returns the records of a file of a raw folder."""
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def _queries(folder, split):
  return [(row["uid"], row["title"], row["target_ind"]) for row in read_lines(folder / SPLITS[split].rows)]


def _labels(folder):
  return [(row["uid"], row["title"]) for row in read_lines(folder / SPLITS["labels"].rows)]


def _csv(rows, delimiter=",", tags="|".join):
  quoted = lambda text: '"' + text.replace('"', '""') + '"'
  lines = [
    delimiter.join(quoted(cell) for cell in (*list(row.values())[:2], tags(row["tags"]), row["split"])) for row in rows
  ]
  return "\n".join([delimiter.join(rows[0]), *lines]) + "\n"


def _json_lines(rows):
  return "".join(json.dumps(row) + "\n\n" for row in rows)


def _as_csv(folder):
  (folder / "t.csv").write_text(_csv(ROWS))
  return folder / "t.csv"


def _as_packed_tsv(folder):
  (folder / "t.tsv.gz").write_bytes(gzip.compress(_csv(ROWS, "\t", json.dumps).encode("utf-8-sig")))
  return folder / "t.tsv.gz"


def _as_csv_with_semicolons(folder):
  (folder / "t.csv").write_text(_csv(ROWS, ";", " | ".join))
  return folder / "t.csv"


def _as_json_lines(folder):
  (folder / "t.jsonl").write_text(_json_lines(ROWS))
  return folder / "t.jsonl"


def _as_parquet(folder):
  pq.write_table(pa.Table.from_pylist(ROWS), folder / "t.parquet", row_group_size=2)
  return folder / "t.parquet"


def _as_arrow_file(folder):
  table = pa.Table.from_pylist(ROWS)
  with pa.ipc.new_file(folder / "t.arrow", table.schema) as file:
    file.write_table(table, max_chunksize=3)
  return folder / "t.arrow"


def _as_several_files(folder):
  for number in range(2):
    (folder / f"part-{number}.jsonl").write_text(_json_lines(ROWS[2 * number : 2 * number + 2]))
  return folder


def _without_split(rows):
  return [{key: value for key, value in row.items() if key != "split"} for row in rows]


def _as_train_and_test_files(folder):
  (folder / "train-00000-of-00002.jsonl").write_text(_json_lines(_without_split(ROWS[:2])))
  (folder / "train-00001-of-00002.jsonl").write_text(_json_lines(_without_split(ROWS[2:3])))
  (folder / "test.jsonl").write_text(_json_lines(_without_split(ROWS[3:])))
  return folder


def _as_train_and_test_folders(folder):
  for split, rows in (("train", ROWS[:3]), ("validation", ROWS[3:])):  # Without test rows, these are for testing.
    (folder / split).mkdir()
    pq.write_table(pa.Table.from_pylist(_without_split(rows)), folder / split / "0.parquet")
  return folder


def _as_table(folder):
  return pa.Table.from_pylist(ROWS)


def _as_records(folder):
  return ROWS


def _as_data_frame(folder):
  return pytest.importorskip("pandas").DataFrame(ROWS)


def _save_hf(folder, rows, batch=2):
  """Writes what `datasets.Dataset.save_to_disk` writes, with the labels as numbers of named classes."""
  numbered = [row | {"tags": [LABELS.index(tag) for tag in row["tags"]]} for row in rows]
  features = {
    "id": {"dtype": "string", "_type": "Value"},
    "name": {"dtype": "string", "_type": "Value"},
    "tags": {"feature": {"names": LABELS, "_type": "ClassLabel"}, "_type": "List"},
  }
  table = pa.Table.from_pylist(numbered).replace_schema_metadata(
    {"huggingface": json.dumps({"info": {"features": features}})}
  )
  folder.mkdir(exist_ok=True)
  with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as file:
    file.write_table(table, max_chunksize=batch)
  state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_data_files": None, "_split": None}
  (folder / "state.json").write_text(json.dumps(state))
  (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
  return folder


def _as_saved_data_set(folder):
  return _save_hf(folder / "saved", ROWS)


def _as_saved_data_sets(folder):
  for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
    _save_hf(folder / split, _without_split(rows))
  (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
  return folder


def _saved_by_the_library(folder):
  """The same by the library itself."""
  hf = pytest.importorskip("datasets")
  tags = hf.Sequence(hf.ClassLabel(names=LABELS))
  features = hf.Features({"id": hf.Value("string"), "name": hf.Value("string"), "tags": tags})
  splits = {"train": ROWS[:3], "test": ROWS[3:]}
  saved = {split: hf.Dataset.from_list(_without_split(rows), features) for split, rows in splits.items()}
  hf.DatasetDict(saved).save_to_disk(folder / "saved")
  return folder / "saved"


FORMATS = [
  _as_csv,
  _as_packed_tsv,
  _as_csv_with_semicolons,
  _as_json_lines,
  _as_parquet,
  _as_arrow_file,
  _as_several_files,
  _as_train_and_test_files,
  _as_train_and_test_folders,
  _as_table,
  _as_records,
  _as_data_frame,
  _as_saved_data_set,
  _as_saved_data_sets,
  _saved_by_the_library,
]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_becomes_the_same_raw_folder(form, tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  found = write_raw_folder(form(source), tmp_path / "raw")
  assert _labels(tmp_path / "raw") == [(name, name) for name in LABELS]
  assert _queries(tmp_path / "raw", "train") == TRAIN
  assert _queries(tmp_path / "raw", "test") == TEST
  assert (found.num_train, found.num_test, found.num_labels, found.num_images) == (3, 1, 4, 0)
  assert found.columns.text == "name" and found.columns.labels == "tags" and found.columns.uid == "id"
