"""Tables in all formats become the same raw folder, which the data sets of the package read."""

import gzip
import io
import json

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import convert_table
from vixml_jax import datasets
from vixml_jax.datasets.raw import SPLITS
from vixml_jax.datasets.raw_images import read_images
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.tables import Columns, convert_shared, write_raw_folder

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
  return pytest.importorskip("pandas", reason="needs pandas: pip install -c constraints.txt -e '.[test]'").DataFrame(
    ROWS
  )


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
  hf = pytest.importorskip("datasets", reason="needs datasets: pip install -c constraints.txt -e '.[test]'")
  tags = hf.Sequence(hf.ClassLabel(names=LABELS))
  features = hf.Features({"id": hf.Value("string"), "name": hf.Value("string"), "tags": tags})
  splits = {"train": ROWS[:3], "test": ROWS[3:]}
  saved = {split: hf.Dataset.from_list(_without_split(rows), features) for split, rows in splits.items()}
  hf.DatasetDict(saved).save_to_disk(folder / "saved")
  return folder / "saved"


def _as_data_set_in_memory(folder):
  hf = pytest.importorskip("datasets", reason="needs datasets: pip install -c constraints.txt -e '.[test]'")
  tags = hf.Sequence(hf.ClassLabel(names=LABELS))
  features = hf.Features({key: hf.Value("string") for key in ROWS[0]} | {"tags": tags})
  return hf.Dataset.from_list(ROWS[::-1], features).select([3, 2, 1, 0])  # A selection has indices.


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
  _as_data_set_in_memory,
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


def test_the_data_sets_of_the_package_read_the_folder(tmp_path):
  write_raw_folder(ROWS, tmp_path / "raw")
  builder = datasets.prepare("custom", tmp_path / "raw", tmp_path / "data")
  assert builder.info.metadata["counts"] == {"train": 3, "test": 1, "labels": 4}
  assert builder.info.metadata["filters"]["source"] == "none"


def test_a_query_that_is_a_label_is_filtered(tmp_path, caplog):
  """Products that are bought together: an own item is no answer, and neither is the reverse of a training pair."""
  products = [{"uid": uid, "title": f"{uid} title"} for uid in "abcd"]
  table = [
    {"uid": "a", "title": "a title", "labels": ["b", "c"], "split": "train"},
    {"uid": "b", "title": "b title", "labels": ["a", "d"], "split": "test"},
    {"uid": "x", "title": "x title", "labels": ["d"], "split": "train"},
  ]
  with caplog.at_level("INFO"):
    write_raw_folder(table, tmp_path / "raw", labels=products)
  assert "2 queries have the uid of a label" in caplog.text
  builder = datasets.prepare("custom", tmp_path / "raw", tmp_path / "data")
  assert builder.info.metadata["filters"]["source"] == "uids"
  filters = {split: _filters(builder, split) for split in ("train", "test")}
  assert filters == {"train": [[0], []], "test": [[0, 1]]}


def _filters(builder, split):
  records = (record for batch in Records(builder, split).batches() for record in batch)
  return [record.numbers("filter_ind", np.int32).tolist() for record in records]


def _image(color, kind="PNG"):
  buffer = io.BytesIO()
  Image.new("RGB", (2, 2), color).save(buffer, kind)
  return buffer.getvalue()


RED, BLUE, GREEN = _image("red"), _image("blue", "JPEG"), _image("green", "WEBP")


def _image_rows(folder):
  (folder / "photos").mkdir()
  (folder / "photos" / "red.png").write_bytes(RED)
  (folder / "blue.jpg").write_bytes(BLUE)
  return ["photos/red.png; blue.jpg", "", "blue.jpg"]


def _paths_in_csv(folder):
  images = _image_rows(folder)
  (folder / "t.csv").write_text("text,labels,image\n" + "".join(f"t{i},l,{images[i]}\n" for i in range(3)))
  return folder / "t.csv"


def _paths_in_json(folder):
  lists = [[part.strip() for part in cell.split(";") if part] for cell in _image_rows(folder)]
  records = [{"text": f"t{i}", "labels": ["l"], "images": lists[i]} for i in range(3)]
  (folder / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  return folder / "t.jsonl"


def _img2dataset(folder):
  """A table in the form of img2dataset: an image for each row, null if it could not be downloaded."""
  table = pa.table(
    {
      "jpg": pa.array([RED, None, BLUE], pa.binary()),
      "url": ["http://a", "http://b", "http://c"],
      "caption": [f"t{i}" for i in range(3)],
      "labels": ["l"] * 3,
      "key": ["000000000", "000000001", "000000002"],
    }
  )
  pq.write_table(table, folder / "00000.parquet")
  return folder


def _hugging_face_images(folder):
  images = [{"bytes": RED, "path": None}, None, {"bytes": BLUE, "path": "blue.jpg"}]
  return pa.Table.from_pylist([{"text": f"t{i}", "label": "l", "image": images[i]} for i in range(3)])


@pytest.mark.parametrize(
  ("form", "expected"),
  [
    (_paths_in_csv, [[RED, BLUE], [], [BLUE]]),
    (_paths_in_json, [[RED, BLUE], [], [BLUE]]),
    (_img2dataset, [[RED], [], [BLUE]]),
    (_hugging_face_images, [[RED], [], [BLUE]]),
  ],
)
def test_images_are_stored_by_row_and_slot(form, expected, tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  found = write_raw_folder(form(source), tmp_path / "raw")
  assert found.num_images == sum(map(len, expected))
  images = {}
  for split in ("train", "test"):
    for row, (query, (slots, blobs)) in enumerate(
      zip(read_lines(tmp_path / "raw" / SPLITS[split].rows), _split_images(tmp_path / "raw", split), strict=True)
    ):
      assert slots == list(range(len(blobs))), row
      images[query["title"]] = blobs
  assert [images[f"t{i}"] for i in range(3)] == expected


def _split_images(raw, split):
  return read_images(raw / SPLITS[split].images, len(read_lines(raw / SPLITS[split].rows)))


def test_labels_of_a_table_have_its_order_texts_and_images(tmp_path):
  labels = [
    {"name": "wool", "text": "made of wool", "content": "from sheep", "image": GREEN},
    {"name": "socks", "text": "socks", "content": "", "image": None},
    {"name": "boots", "text": "boots", "content": "", "image": None},
    {"name": "outdoor", "text": "outdoor", "content": "", "image": None},
    {"name": "unused", "text": "unused", "content": "", "image": None},
  ]
  found = write_raw_folder(ROWS, tmp_path / "raw", labels=labels)
  assert (found.num_labels, found.num_images) == (5, 1)
  rows = read_lines(tmp_path / "raw" / SPLITS["labels"].rows)
  assert rows[0] == {"uid": "wool", "title": "made of wool", "content": "from sheep"}
  assert [row["uid"] for row in rows] == ["wool", "socks", "boots", "outdoor", "unused"]
  assert [targets for _, _, targets in _queries(tmp_path / "raw", "train")] == [[1, 0], [2], [2, 3]]
  assert next(_split_images(tmp_path / "raw", "labels")) == ([0], [GREEN])


def test_labels_that_are_whole_numbers_become_names(tmp_path):
  write_raw_folder([{"text": f"t{row}", "label": row % 2} for row in range(4)], tmp_path / "raw")
  assert _labels(tmp_path / "raw") == [("0", "0"), ("1", "1")]


@pytest.mark.parametrize(
  ("cells", "separator", "expected"),
  [
    (["a, b", "c"], None, ["a", "b", "c"]),
    (["a b", "c"], None, ["a b", "c"]),
    (["a, b", "c"], "", ["a, b", "c"]),
    (["a, b | c", "d"], "|", ["a, b", "c", "d"]),
    (['["a|b", "c"]', "[1]"], None, ["a|b", "c", "1"]),
    (["a / b", "c"], " / ", ["a", "b", "c"]),
  ],
)
def test_texts_of_labels_are_divided(cells, separator, expected, tmp_path):
  rows = [{"text": f"t{row}", "tags": cell} for row, cell in enumerate(cells)]
  write_raw_folder(rows, tmp_path / "raw", separator=separator)
  assert [name for name, _ in _labels(tmp_path / "raw")] == expected


def _texts(raw, split):
  return [row["title"] for row in read_lines(raw / SPLITS[split].rows)]


def test_near_duplicates_are_on_one_side_and_the_seed_decides(tmp_path):
  rng = np.random.default_rng(0)
  words = [f"{chr(97 + i % 26)}{i}" for i in range(300)]
  pairs = [rng.choice(words, 2, replace=False).tolist() for _ in range(400)]
  texts = [" ".join(pair) for pair in pairs] + [" ".join(pair[::-1]).title() for pair in pairs]
  rows = [{"text": text, "label": "x"} for text in texts]
  found = write_raw_folder(rows, tmp_path / "a")
  test = {frozenset(text.lower().split()) for text in _texts(tmp_path / "a", "test")}
  train = {frozenset(text.lower().split()) for text in _texts(tmp_path / "a", "train")}
  assert not test & train
  assert 40 < found.num_test < 130
  write_raw_folder(rows, tmp_path / "b")
  assert _texts(tmp_path / "b", "test") == _texts(tmp_path / "a", "test")
  write_raw_folder(rows, tmp_path / "c", seed=1)
  assert _texts(tmp_path / "c", "test") != _texts(tmp_path / "a", "test")


def test_long_texts_that_differ_in_a_rare_word_are_on_one_side(tmp_path):
  rng = np.random.default_rng(0)
  words = [f"{chr(97 + i % 26)}{i}" for i in range(5000)]
  texts = [" ".join(rng.choice(words, 12, replace=False)) for _ in range(300)]
  copies = [f"{text.rpartition(' ')[0]} only{row}" for row, text in enumerate(texts)]
  write_raw_folder([{"text": text, "label": "x"} for text in texts + copies], tmp_path / "raw")
  start = lambda split: {text.rpartition(" ")[0] for text in _texts(tmp_path / "raw", split)}
  assert len(start("test")) > 10 and len(start("test") & start("train")) <= 2


def test_texts_without_letters_are_divided_as_well(tmp_path):
  """Icons of fonts and emoji, which are no words."""
  texts = [chr(0x1F600 + row) for row in range(60)] + ["!!!", "?!", "+", "->"]
  found = write_raw_folder([{"text": text, "label": "x"} for text in texts], tmp_path / "raw")
  assert 1 <= found.num_test < 20


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_each_side_has_a_row(fraction, tmp_path):
  found = write_raw_folder(
    [{"text": text, "label": "x"} for text in "abcdef"], tmp_path / "raw", test_fraction=fraction
  )
  assert {found.num_train, found.num_test} == {1, 5}


def test_the_same_table_is_written_once(tmp_path):
  (tmp_path / "t.csv").write_text("text,labels\na b,x\nc d,y\n")
  first = write_raw_folder(tmp_path / "t.csv", tmp_path / "raw")
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "raw").iterdir()}
  assert write_raw_folder(tmp_path / "t.csv", tmp_path / "raw") == first
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "raw").iterdir()} == before
  with pytest.raises(InputError, match="from another table or with other settings"):
    write_raw_folder(tmp_path / "t.csv", tmp_path / "raw", seed=1)
  (tmp_path / "t.csv").write_text("text,labels\na b,x\nc d,z\n")
  with pytest.raises(InputError, match="from another table"):
    write_raw_folder(tmp_path / "t.csv", tmp_path / "raw")
  other, *_ = convert_shared(tmp_path / "all", tmp_path / "t.csv")
  assert other.folder.parent.name.startswith("t-")
  assert convert_shared(tmp_path / "all", tmp_path / "t.csv")[0] == other


@pytest.mark.parametrize("table", [ROWS, pa.Table.from_pylist(ROWS)])
def test_the_same_table_in_memory_is_written_once(table, tmp_path):
  found = [convert_shared(tmp_path, data)[0].folder for data in (table, table, table[1:])]
  assert found[0] == found[1] != found[2]


def test_a_changed_image_is_noticed(tmp_path):
  table = _paths_in_csv(tmp_path)
  write_raw_folder(table, tmp_path / "raw")
  (tmp_path / "blue.jpg").write_bytes(GREEN)
  with pytest.raises(InputError, match=r"blue\.jpg has changed since it was written; delete"):
    write_raw_folder(table, tmp_path / "raw")


def test_a_damaged_folder_is_noticed(tmp_path):
  write_raw_folder(ROWS, tmp_path / "raw")
  (tmp_path / "raw" / SPLITS["test"].rows).write_bytes(b"")
  with pytest.raises(InputError, match=r"tst\.json\.gz: is damaged"):
    write_raw_folder(ROWS, tmp_path / "raw")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
  (tmp_path / "mine.txt").write_text("x")
  with pytest.raises(InputError, match="has other files than those of a converted table"):
    write_raw_folder(ROWS, tmp_path)
  assert (tmp_path / "mine.txt").read_text() == "x"


def test_rows_without_a_column_of_uids_have_their_number(tmp_path):
  write_raw_folder(ROWS, tmp_path / "raw", columns=Columns(uid=""))
  assert [uid for uid, _, _ in _queries(tmp_path / "raw", "train")] == ["row/0", "row/1", "row/2"]


def test_columns_are_shown_with_their_reasons(tmp_path):
  rows = [{"asin": f"{i}", "sku": f"{i}", "what": f"text {i}", "topics of it": ["x"]} for i in range(3)]
  found = write_raw_folder(rows, tmp_path / "raw")
  assert found.summary == (
    "text: column 'what', the only other one with texts",
    "labels: column 'topics of it', the only other one with lists",
    "uid: none; 'asin', 'sku' are possible: name one with --uid_column",
    "split: made here, 10% for testing (--test_fraction), texts that are nearly the same on one side",
  )


def test_the_benchmark_converts_its_table(tmp_path):
  convert_table.write(tmp_path / "table.csv", rows=300, labels=50)
  measured = convert_table.measure(tmp_path / "table.csv", tmp_path / "raw")
  assert measured["train"] + measured["test"] == 300 and 0 < measured["labels"] <= 50
