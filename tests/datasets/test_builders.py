"""Prepared data sets: order, counts, fingerprints, and the files after a killed or repeated preparation."""

import io
import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from tests.helpers import miniature
from tests.helpers.damage import DAMAGES, files_of
from vixml_jax import datasets
from vixml_jax.datasets import builders, prepared, raw_records
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.manifest import MANIFEST

EMBEDDED = Path(prepared.__file__).parent / "mm_icons_9k"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def raw_dir(tmp_path):
  return miniature.write_raw_folder(tmp_path / "raw", images=True)


def _uids(builder, split):
  return [row["uid"].decode() for row in builder.as_data_source(split)]


def _lines(folder, split):
  return miniature.read_lines(folder / f"{miniature.SPLIT_NAMES[split]}.json.gz")


@pytest.mark.parametrize("rows_per_shard", [50_000, 500, 419])
def test_rows_keep_their_order_across_shards(tmp_path, monkeypatch, rows_per_shard):
  monkeypatch.setattr(builders, "ROWS_PER_SHARD", rows_per_shard)
  folder = miniature.write_raw_folder(tmp_path / "raw", num_train=1500, num_labels=1257)
  builder = datasets.prepare("custom", folder, tmp_path / "data")
  for split in ("train", "test", "labels"):
    assert _uids(builder, split) == [line["uid"] for line in _lines(folder, split)]
  shards = -(-1500 // rows_per_shard)
  assert builder.info.splits["train"].num_shards == shards
  assert builder.info.splits["train"].num_examples == 1500


def test_every_feature_is_that_of_the_raw_files(raw_dir, tmp_path):
  builder = datasets.prepare("custom", raw_dir, tmp_path / "data")
  images = pq.read_table(raw_dir / "trn_images.parquet").to_pylist()
  pairs = [line.split() for line in (raw_dir / "filter_labels_train.txt").read_text().splitlines()]
  rows = zip(_lines(raw_dir, "train"), builder.as_data_source("train"), strict=True)
  for number, (line, row) in enumerate(rows):
    assert (row["title"].decode(), row["content"].decode()) == (line["title"], line["content"])
    np.testing.assert_array_equal(row["target_ind"], line["target_ind"])
    np.testing.assert_array_equal(row["target_rel"], line["target_rel"])
    assert row["filter_ind"].tolist() == [int(b) for a, b in pairs if int(a) == number]
    own = [(image["slot"], image["png"]) for image in images if image["row"] == number]
    assert list(zip(row["image_slots"].tolist(), row["images"].tolist(), strict=True)) == own


def test_records_read_what_tfds_decodes(raw_dir, tmp_path):
  builder = datasets.prepare("custom", raw_dir, tmp_path / "data")
  for split in ("train", "labels"):
    records = [record for batch in Records(builder, split).batches() for record in batch]
    for record, row in zip(records, builder.as_data_source(split), strict=True):
      assert record.text(["title", "content"]) == f"{row['title'].decode()} {row['content'].decode()}"
      np.testing.assert_array_equal(record.numbers("target_ind", np.int32), row["target_ind"])
      np.testing.assert_array_equal(record.numbers("target_rel", np.float32), row["target_rel"])
      slots, images = row["image_slots"].tolist(), row["images"].tolist()
      assert record.images() == list(zip(slots, images, strict=True))


@pytest.mark.parametrize("name", sorted(builders.BUILDERS))
def test_every_data_set_is_prepared_from_a_miniature(name, tmp_path, monkeypatch):
  folder = miniature.write_raw_folder(tmp_path / "raw")
  miniature.expect_miniature(monkeypatch, name, folder)
  builder = datasets.prepare(name, folder, tmp_path / "data")
  assert builder.name == name
  assert builder.info.metadata["counts"] == {"train": 64, "test": 16, "labels": 24}
  fields = ["title", "content"] if name == "lf_amazon_131k" else ["title"]
  assert builder.info.metadata["text_fields"] == fields
  assert _uids(datasets.open_dataset(name, tmp_path / "data"), "test")[3] == "test/3"


@pytest.mark.parametrize("name", sorted(set(builders.BUILDERS) - {"custom"}))
def test_published_set_of_another_size_is_refused(name, raw_dir, tmp_path):
  expected = builders.EXPECTED_COUNTS[name]["train"]
  with pytest.raises(InputError, match=f"trn.json.gz: 64 rows, but {name} has {expected}"):
    datasets.prepare(name, raw_dir, tmp_path / "data")
  assert not list((tmp_path / "data" / name).iterdir())


def test_builders_are_registered_with_tfds(tmp_path):
  assert isinstance(tfds.builder("lf_amazon_titles_1_3m", data_dir=tmp_path), builders.RawFolder)


def test_preparing_again_writes_nothing(raw_dir, tmp_path):
  def state():
    return {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "custom").rglob("*")}

  datasets.prepare("custom", raw_dir, tmp_path / "data")
  before = state()
  datasets.prepare("custom", raw_dir, tmp_path / "data")
  datasets.prepare("custom", None, tmp_path / "data")
  datasets.prepare("custom", "", tmp_path / "data")
  assert state() == before


def test_changed_raw_file_is_named_even_with_equal_size_and_time(raw_dir, tmp_path):
  datasets.prepare("custom", raw_dir, tmp_path / "data")
  path = raw_dir / "filter_labels_test.txt"
  stat, text = path.stat(), path.read_text()
  path.write_text(text.replace("0 0", "1 0", 1))
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert path.stat().st_size == stat.st_size
  with pytest.raises(InputError, match=r"other raw files .* \(filter_labels_test.txt differ\)"):
    datasets.prepare("custom", raw_dir, tmp_path / "data")


def _read_all(name, data_dir):
  builder = datasets.open_dataset(name, data_dir)
  for split in ("train", "test", "labels"):
    for batch in Records(builder, split).batches():
      for record in batch:
        record.text(("title", "content"))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_noticed_before_its_rows_are_used(raw_dir, tmp_path, kind):
  datasets.prepare("custom", raw_dir, tmp_path / "data")
  whole = tmp_path / "data" / "custom" / "1.0.0"
  for name in files_of(whole):
    copy = tmp_path / "copy" / "custom" / "1.0.0"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    DAMAGES[kind](copy / name)
    if name == MANIFEST and kind == "missing":
      _read_all("custom", tmp_path / "copy")  # As if an earlier version had written the folder.
      continue
    with pytest.raises(InputError, match=f"{copy}.* delete (the folder|{copy}) and start the same command") as error:
      _read_all("custom", tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line(raw_dir, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(InputError, match=r"custom/1.0.0: cannot be written \(File too large\); nothing that"):
      datasets.prepare("custom", raw_dir, tmp_path / "data")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  datasets.prepare("custom", raw_dir, tmp_path / "data")


def test_data_that_were_never_prepared_are_requested(tmp_path):
  with pytest.raises(InputError, match="set --config.dataset.raw_dir to the folder"):
    datasets.prepare("lf_amazon_131k", None, tmp_path)
  with pytest.raises(InputError, match="no prepared data set; run python -m vixml_jax.prepare_data"):
    datasets.open_dataset("custom", tmp_path)


def test_unknown_name_gives_the_known_names(tmp_path):
  with pytest.raises(InputError, match="unknown data set 'amazon'; choose from lf_amazon_titles_131k"):
    datasets.prepare("amazon", None, tmp_path)


def test_data_dir_that_is_a_file_is_named(raw_dir, tmp_path):
  (tmp_path / "data").touch()
  with pytest.raises(InputError, match="data: cannot be written to"):
    datasets.prepare("custom", raw_dir, tmp_path / "data")


@pytest.mark.parametrize("split", ["train", "test", "labels"])
def test_mistake_in_the_last_row_leaves_nothing_behind(raw_dir, tmp_path, split, monkeypatch):
  monkeypatch.setattr(builders, "ROWS_PER_SHARD", 8)
  path = raw_dir / f"{miniature.SPLIT_NAMES[split]}.json.gz"
  lines = miniature.read_lines(path)
  lines[-1]["title"] = None
  miniature.write_lines(path, lines)
  with pytest.raises(InputError, match=f"{path.name}:{len(lines)}: key 'title' must be a string"):
    datasets.prepare("custom", raw_dir, tmp_path / "data")
  assert not list((tmp_path / "data" / "custom").iterdir())


def test_label_that_repeats_at_the_end_of_a_full_shard_is_refused(raw_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(builders, "ROWS_PER_SHARD", 8)
  lines = _lines(raw_dir, "labels")
  assert len(lines) % 8 == 0
  lines[-1]["uid"] = lines[2]["uid"]
  miniature.write_lines(raw_dir / "lbl.json.gz", lines)
  with pytest.raises(InputError, match="lbl.json.gz:24: the same uid as line 3"):
    datasets.prepare("custom", raw_dir, tmp_path / "data")


def test_empty_file_is_refused(raw_dir, tmp_path):
  miniature.write_lines(raw_dir / "tst.json.gz", [])
  with pytest.raises(InputError, match="tst.json.gz: the file is empty"):
    datasets.prepare("custom", raw_dir, tmp_path / "data")


def test_each_kind_of_unusual_value_is_logged_once(raw_dir, tmp_path, caplog):
  lines = _lines(raw_dir, "train")
  for line in lines[4:9]:
    line["title"] = ""
  miniature.write_lines(raw_dir / "trn.json.gz", lines)
  datasets.prepare("custom", raw_dir, tmp_path / "data")
  warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
  assert warnings == [f"{raw_dir / 'trn.json.gz'}: 5 rows with an empty title, first at line 5"]


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[3])
from vixml_jax import datasets
from vixml_jax.datasets import builders, raw_records
builders.ROWS_PER_SHARD = 8
read = raw_records.read_queries
def slow(*arguments):
  for number, row in enumerate(read(*arguments)):
    if number == 30:
      print("halfway", file=sys.stderr, flush=True)
      time.sleep(60)
    yield row
raw_records.read_queries = slow
datasets.prepare("custom", sys.argv[1], sys.argv[2])
"""


def test_killed_preparation_starts_cleanly_again(raw_dir, tmp_path):
  process = subprocess.Popen([sys.executable, "-c", KILLED, raw_dir, tmp_path / "data", ROOT], stderr=subprocess.PIPE)
  with process:
    line = process.stderr.readline()
    process.send_signal(signal.SIGKILL)
  assert line == b"halfway\n"
  left = list((tmp_path / "data" / "custom").iterdir())
  assert left and left[0].name != "1.0.0"
  builder = datasets.prepare("custom", raw_dir, tmp_path / "data")
  assert len(builder.as_data_source("train")) == 64
  assert [path.name for path in (tmp_path / "data" / "custom").iterdir()] == ["1.0.0"]


def test_two_processes_prepare_one_set(raw_dir, tmp_path):
  code = "import sys; from vixml_jax import datasets; datasets.prepare('custom', *sys.argv[1:])"
  processes = [subprocess.Popen([sys.executable, "-c", code, raw_dir, tmp_path / "data"], cwd=ROOT) for _ in range(2)]
  assert [process.wait() for process in processes] == [0, 0]
  assert len(datasets.open_dataset("custom", tmp_path / "data").as_data_source("train")) == 64


def test_memory_does_not_grow_with_the_rows_of_a_shard(raw_dir, tmp_path, monkeypatch):
  held = []
  encode_example = tfds.features.FeaturesDict.encode_example

  def kept(self, example):
    held.append(example)
    return encode_example(self, example)

  monkeypatch.setattr(tfds.features.FeaturesDict, "encode_example", kept)
  datasets.prepare("custom", raw_dir, tmp_path / "data")
  assert len(held) == 64 + 16 + 24
  assert sum(map(len, held)) == 0


def test_embedded_set_opens_without_a_raw_folder(tmp_path):
  builder = datasets.prepare("mm_icons_9k", None, tmp_path)
  row = next(iter(builder.as_data_source("train")))
  assert row["title"] == b"f1 race"
  assert row["target_ind"].tolist() == [3074, 3431, 6680, 6682, 7841, 7874]
  assert row["images"][0][:4] == b"RIFF"
  images = sum(len(record.images()) for batch in Records(builder, "test").batches() for record in batch)
  assert images == 8765


def test_embedded_set_has_its_licenses_and_provenance():
  assert len(list((EMBEDDED / "LICENSES").iterdir())) == 17
  assert "Provenance and licences" in (EMBEDDED / "README.md").read_text()
  sizes = {path.suffix: 0 for path in EMBEDDED.rglob("*")}
  for path in EMBEDDED.rglob("*"):
    sizes[path.suffix] += path.stat().st_size
  assert sizes.pop(".npz") <= 4e6, "the image tower"
  assert sum(sizes.values()) < 14e6


def test_embedded_images_are_opaque_and_of_one_size():
  table = pq.read_table(EMBEDDED / "tst_images.parquet")
  for blob in table.column("image").to_pylist()[::100]:
    image = Image.open(io.BytesIO(blob))
    assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB")


def test_embedded_filter_never_removes_a_positive():
  data_warnings = raw_records.DataWarnings()
  queries = list(raw_records.read_queries(EMBEDDED / "tst.json.gz", 9527, data_warnings))
  excluded = raw_records.read_filter(EMBEDDED / "filter_labels_test.txt", len(queries), 9527)
  assert len(excluded.values) == 1276
  assert not any(set(query["target_ind"]) & set(excluded[row]) for row, query in enumerate(queries))
  assert not data_warnings.messages()
