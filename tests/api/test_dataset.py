"""`vixml_jax.Dataset`: where sets come from, what they contain, and what is refused."""

import gzip

import pytest

from tests.helpers.miniature import read_lines, write_raw_folder
from tests.helpers.trained_workdirs import raw_records
import vixml_jax


@pytest.fixture
def raw(tmp_path):
  return write_raw_folder(tmp_path / "raw", num_train=12, num_test=6, images=True)


def test_a_folder_has_queries_and_labels(raw, tmp_path):
  dataset = vixml_jax.Dataset.from_folder(raw, data_dir=tmp_path / "data")
  assert (dataset.num_queries, dataset.num_test_queries, dataset.num_labels) == (12, 6, 24)
  assert repr(dataset) == "Dataset('custom', queries=12, test_queries=6, labels=24, images=True)"


def test_folders_of_the_same_name_have_places_of_their_own_and_published_sets_share_one(raw, tmp_path):
  other = write_raw_folder(tmp_path / "other" / "raw")
  places = [vixml_jax.Dataset.from_folder(folder).data_dir for folder in (raw, other, raw)]
  assert places[0] == places[2] != places[1] and places[0].name.startswith("raw-")
  assert str(vixml_jax.Dataset.from_folder(raw, name="lf_amazon_131k").data_dir) == "data"


def test_queries_have_texts_images_filters_and_the_uids_of_their_labels(raw, tmp_path):
  dataset = vixml_jax.Dataset.from_folder(raw, data_dir=tmp_path / "data")
  labels = read_lines(raw / "lbl.json.gz")
  for split, file in (("train", "filter_labels_train.txt"), ("test", "filter_labels_test.txt")):
    pairs = [tuple(map(int, line.split())) for line in (raw / file).read_text().splitlines()]
    found = list(dataset.queries(split))
    records = raw_records(raw, split)
    assert len(found) == len(records)
    for row, (query, record) in enumerate(zip(found, records, strict=True)):
      assert query.labels == [labels[i]["uid"] for i in record["target_ind"]]
      denied = [labels[label]["uid"] for other, label in pairs if other == row]
      wanted = {key: record[key] for key in ("uid", "title", "content", "images") if key in record}
      assert query.query == wanted | ({"deny": denied} if denied else {})


def test_a_table_in_memory_and_in_a_file_give_the_same_set(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  rows = [("red wool socks", ["socks", "wool"]), ("rain boots", ["boots"]), ("wool hat", ["hat", "wool"])]
  table = [{"text": text, "labels": labels} for text, labels in rows]
  (tmp_path / "products.csv").write_text("text,labels\n" + "".join(f"{t},{'|'.join(ls)}\n" for t, ls in rows))
  sets = [vixml_jax.Dataset.from_table(data, test_fraction=0.34) for data in (table, table, "products.csv")]
  assert sets[0] == sets[1] and sets[0].data_dir != sets[2].data_dir
  assert str(sets[2].data_dir).startswith("data/products-")
  for dataset in sets:
    assert dataset.num_queries > 0 and dataset.num_test_queries > 0
    assert (dataset.num_queries + dataset.num_test_queries, dataset.num_labels) == (3, 4)
    found = [(query.query["title"], query.labels) for split in ("train", "test") for query in dataset.queries(split)]
    assert sorted((title, sorted(labels)) for title, labels in found) == sorted((t, sorted(ls)) for t, ls in rows)


def test_a_wrong_table_is_an_input_error(tmp_path):
  with pytest.raises(vixml_jax.InputError, match="cannot tell which column has the text"):
    vixml_jax.Dataset.from_table([{"text": "a", "labels": ["x"]}, {"text": 5.5, "labels": ["y"]}], data_dir=tmp_path)


def test_the_embedded_set_is_mm_icons():
  dataset = vixml_jax.Dataset.embedded()
  assert (dataset.name, dataset.num_queries, dataset.num_labels) == ("mm_icons_9k", 17_083, 9_527)


def test_what_is_missing_or_unknown_is_named(raw, tmp_path):
  with pytest.raises(vixml_jax.InputError, match="nowhere: no such folder"):
    vixml_jax.Dataset.from_folder(tmp_path / "nowhere")
  with pytest.raises(vixml_jax.InputError, match="name='amazon': there is no such data set; choose from .*custom"):
    vixml_jax.Dataset.from_folder(raw, name="amazon")
  dataset = vixml_jax.Dataset.from_folder(raw, data_dir=tmp_path / "data")
  with pytest.raises(vixml_jax.InputError, match="split='labels': must be test or train"):
    next(dataset.queries("labels"))
  (raw / "lbl.json.gz").write_bytes(gzip.compress(b""))
  with pytest.raises(vixml_jax.InputError, match=r"lbl.json.gz: the file is empty"):
    _ = dataset.num_labels
