"""The four published sets are prepared from archives laid out as published: packed or not, nested or not."""

import gzip
import io
import json
import tarfile
import zipfile

import pytest

from vixml_jax import datasets
from vixml_jax.datasets import builders
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError

# uid -> title. Queries and labels are products of one shop.
PRODUCTS = {
  "B01": "Caf\xe9 table",
  "B02": "red shoe",
  "B03": "wool socks",
  "B04": "steel lamp",
  "B05": " chess set ",
  "B06": "blue shoe",
}
LABELS = ["B03", "B01", "B02", "B05"]
TRAIN = {"B01": ["B02", "B03"], "B04": ["B01"], "B02": ["B05"]}
TEST = {"B03": ["B05", "B02"], "B06": ["B02"]}

# Training queries B01 and B02 are labels 1 and 2, test query B03 is label 0, and training query B01 has the label B03.
MADE = {"train": [[1], [], [2]], "test": [[0, 1], []]}
# Other pairs than those, so that a test sees which ones are used.
GIVEN = {"train": [[1], [3], []], "test": [[0], [2]]}

JSON_SETS = {
  "lf_amazon_titles_131k": ("LF-Amazon-131K", "LF-AmazonTitles-131K"),
  "lf_amazon_131k": ("LF-Amazon-131K", "LF-Amazon-131K"),
  "lf_amazon_titles_1_3m": ("LF-AmazonTitles-1.3M", "LF-AmazonTitles-1.3M"),
}


def _json(rows, targets=None):
  lines = []
  for uid in rows:
    line = {"uid": uid, "title": PRODUCTS[uid], "content": f"about {uid}"}
    if targets:
      line |= {"target_ind": [LABELS.index(label) for label in targets[uid]], "target_rel": [1.0] * len(targets[uid])}
    lines.append(json.dumps(line) + "\n")
  return gzip.compress("".join(lines).encode())


def _raw_archive():
  """The raw texts of an LF set."""
  return {"trn.json.gz": _json(TRAIN, TRAIN), "tst.json.gz": _json(TEST, TEST), "lbl.json.gz": _json(LABELS)}


def _matrix(targets):
  rows = [" ".join(f"{LABELS.index(label)}:1.0" for label in labels) for labels in targets.values()]
  return "".join(f"{line}\n" for line in (f"{len(targets)} {len(LABELS)}", *rows)).encode()


def _filter_files():
  return {
    f"filter_labels_{split}.txt": "".join(f"{i} {label}\n" for i, row in enumerate(rows) for label in row).encode()
    for split, rows in GIVEN.items()
  }


def _bag_of_words_archive():
  """The bag-of-words features of an LF set: matrices, which are not read, and filter files."""
  features = {f"{split}_X_Xf.txt": b"2 5\n0:0.5 3:0.1\n1:1.0\n" for split in ("trn", "tst", "lbl")}
  return features | {"trn_X_Y.txt": _matrix(TRAIN), "tst_X_Y.txt": _matrix(TEST)} | _filter_files()


def _mufin_archive():
  """MM-AmazonTitles-300K."""
  texts = {
    f"raw_data/{name}.raw.txt": "".join(f"{uid}->{PRODUCTS[uid]}\n" for uid in rows).encode("latin-1")
    for name, rows in (("train", TRAIN), ("test", TEST), ("label", LABELS))
  }
  return texts | {"trn_X_Y.txt": _matrix(TRAIN), "tst_X_Y.txt": _matrix(TEST), "img.urls.txt": b"B01\thttp://x\n"}


def _write(folder, name, files, how, nested):
  """Writes files as a folder, a .zip or a .tar.gz; in a folder with the name of the set if nested."""
  folder.mkdir(parents=True, exist_ok=True)
  files = {f"{name}/{path}" if nested else path: content for path, content in files.items()}
  if how == "zip":
    with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
      for path, content in files.items():
        archive.writestr(path, content)
  elif how == "tar.gz":
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as archive:
      for path, content in files.items():
        info = tarfile.TarInfo(path)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
  else:
    for path, content in files.items():
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      (folder / path).write_bytes(content)


@pytest.fixture(autouse=True)
def _published_counts_of_the_miniature(monkeypatch):
  for name in builders.EXPECTED_COUNTS:
    monkeypatch.setitem(builders.EXPECTED_COUNTS, name, {"train": len(TRAIN), "test": len(TEST), "labels": len(LABELS)})


def _check(builder, filters, content):
  for split, targets in (("train", TRAIN), ("test", TEST), ("labels", {uid: [] for uid in LABELS})):
    rows = list(builder.as_data_source(split))
    assert [row["uid"].decode() for row in rows] == list(targets)
    assert [row["title"].decode() for row in rows] == [PRODUCTS[uid] for uid in targets]
    assert [row["content"].decode() for row in rows] == [f"about {uid}" if content else "" for uid in targets]
    assert [[LABELS[label] for label in row["target_ind"]] for row in rows] == list(targets.values())
    assert [row["filter_ind"].tolist() for row in rows] == filters.get(split, [[]] * len(rows))
  assert len(next(iter(Records(builder, "train").batches()))) == len(TRAIN)


@pytest.mark.parametrize("how", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("with_filters", [False, True])
@pytest.mark.parametrize("name", JSON_SETS)
def test_set_with_json_is_prepared_as_published(tmp_path, name, with_filters, how, nested):
  raw_name, bow_name = JSON_SETS[name]
  _write(tmp_path / "raw", f"{raw_name}.raw" if how != "folder" else raw_name, _raw_archive(), how, nested)
  if with_filters:
    _write(tmp_path / "raw", f"{bow_name}.bow", _bag_of_words_archive(), how, nested)
  builder = datasets.prepare(name, tmp_path / "raw", tmp_path / "data")
  _check(builder, GIVEN if with_filters else MADE, content=True)
  assert builder.info.metadata["filters"]["source"] == ("files" if with_filters else "uids")
  # The same files are recognized when they lie elsewhere.
  files = _raw_archive() | (_filter_files() if with_filters else {})
  _write(tmp_path / "flat", "", {path: _member(tmp_path / "raw", path) for path in files}, "folder", nested=False)
  datasets.prepare(name, tmp_path / "flat", tmp_path / "data")


def _member(folder, name):
  """Returns the content of a file in a folder or in the archives of a folder."""
  for path in sorted(folder.rglob("*")):
    if path.name == name:
      return path.read_bytes()
    if path.suffix == ".zip":
      with zipfile.ZipFile(path) as archive:
        for inner in archive.namelist():
          if inner.split("/")[-1] == name:
            return archive.read(inner)
    if path.suffix == ".gz" and tarfile.is_tarfile(path):
      with tarfile.open(path) as archive:
        for info in archive:
          if info.name.split("/")[-1] == name:
            return archive.extractfile(info).read()
  raise KeyError(name)


@pytest.mark.parametrize("how", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("with_filters", [False, True])
def test_mm_amazon_titles_300k_is_prepared_as_published(tmp_path, with_filters, how, nested):
  files = _mufin_archive() | (_filter_files() if with_filters else {})
  _write(tmp_path / "raw", "MM-AmazonTitles-300K", files, how, nested)
  builder = datasets.prepare("mm_amazon_titles_300k", tmp_path / "raw", tmp_path / "data")
  _check(builder, GIVEN if with_filters else MADE, content=False)
  assert {"train.raw.txt", "trn_X_Y.txt", "label.raw.txt"} <= builder.info.metadata["sha256"].keys()
  assert "img.urls.txt" not in builder.info.metadata["sha256"]


@pytest.mark.parametrize("how", ["zip", "tar.gz"])
def test_archive_itself_can_be_the_raw_dir(tmp_path, how):
  _write(tmp_path / "raw", "LF-Amazon-131K", _raw_archive(), how, nested=True)
  builder = datasets.prepare("lf_amazon_131k", tmp_path / "raw" / f"LF-Amazon-131K.{how}", tmp_path / "data")
  _check(builder, MADE, content=True)


def test_prepared_set_is_refused_when_filters_appear_beside_its_rows(tmp_path):
  _write(tmp_path / "raw", "LF-Amazon-131K", _raw_archive(), "zip", nested=True)
  datasets.prepare("lf_amazon_131k", tmp_path / "raw", tmp_path / "data")
  _write(tmp_path / "raw", "bow", _bag_of_words_archive(), "zip", nested=True)
  with pytest.raises(InputError, match=r"\(filter_labels_test.txt, filter_labels_train.txt differ\)"):
    datasets.prepare("lf_amazon_131k", tmp_path / "raw", tmp_path / "data")


def test_archive_of_another_size_is_refused_before_it_is_prepared(tmp_path, monkeypatch):
  monkeypatch.setitem(builders.EXPECTED_COUNTS, "lf_amazon_131k", {"train": 4, "test": 2, "labels": 4})
  _write(tmp_path / "raw", "LF-Amazon-131K", _raw_archive(), "zip", nested=True)
  with pytest.raises(InputError, match=r"LF-Amazon-131K.zip/LF-Amazon-131K/trn.json.gz: 3 rows, but lf_amazon_131k"):
    datasets.prepare("lf_amazon_131k", tmp_path / "raw", tmp_path / "data")
