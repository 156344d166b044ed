"""The places of raw files: folders and archives, nested or not; a missing, doubled or unsafe file is named."""

import gzip
import hashlib
import io
import tarfile
import zipfile

import pytest

from tests.helpers import miniature
from vixml_jax.datasets import archives, raw, raw_records
from vixml_jax.errors import InputError

ROWS = ("trn.json.gz", "tst.json.gz", "lbl.json.gz")
FILTERS = ("filter_labels_train.txt", "filter_labels_test.txt")


@pytest.fixture
def folder(tmp_path):
  return miniature.write_raw_folder(tmp_path / "raw", num_train=3, num_test=2, num_labels=4)


def _pack(path, files):
  """Writes the archive `path` with files: name in the archive -> bytes."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".zip":
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
      for name, content in files.items():
        archive.writestr(name, content)
  else:
    with tarfile.open(path, "w:gz") as archive:
      for name, content in files.items():
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
  return path


def _contents(folder, names, prefix=""):
  return {f"{prefix}{name}": (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("trn.json.gz", "missing; the folder must have trn.json.gz, tst.json.gz, lbl.json.gz, one JSON object per line"),
    ("lbl.json.gz", "missing; the folder must have"),
    ("filter_labels_train.txt", "missing, but there is .*filter_labels_test.txt; add the file, or remove the other"),
    ("filter_labels_test.txt", "missing, but there is .*filter_labels_train.txt"),
  ],
)
def test_missing_file_is_named_with_what_to_do(folder, name, message):
  raw.find_files(folder)
  (folder / name).unlink()
  with pytest.raises(InputError, match=message) as caught:
    raw.find_files(folder)
  assert str(caught.value).startswith(f"{folder / name}: ")
  assert "empty file" not in str(caught.value)


def test_missing_folder_and_empty_folder_are_named(tmp_path):
  with pytest.raises(InputError, match="no such folder; set --config.dataset.raw_dir"):
    raw.find_files(tmp_path / "nowhere")
  with pytest.raises(InputError, match="trn.json.gz: missing; the folder, or an archive in it, must have"):
    raw.find_files(tmp_path)
  (tmp_path / "file.txt").touch()
  with pytest.raises(InputError, match="file.txt: is not a folder or a .zip or .tar.gz archive"):
    raw.find_files(tmp_path / "file.txt")


def test_filter_files_are_optional(folder):
  for name in FILTERS:
    (folder / name).unlink()
  found = raw.find_files(folder)
  assert [found[split].filter for split in ("train", "test", "labels")] == [None, None, None]
  assert [found[split].rows for split in ("train", "test", "labels")] == [folder / name for name in ROWS]


def test_hashes_are_those_of_the_files_that_exist(folder):
  assert raw.sha256_of_files(raw.find_files(folder)) == {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
  }


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tgz"])
@pytest.mark.parametrize("prefix", ["", "LF-Amazon-131K/"])
@pytest.mark.parametrize("lying_in_a_folder", [False, True])
def test_hashes_of_an_archive_are_those_of_its_files_unpacked(tmp_path, folder, suffix, prefix, lying_in_a_folder):
  archive = _pack(tmp_path / "packed" / f"raw{suffix}", _contents(folder, (*ROWS, *FILTERS), prefix))
  found = raw.find_files(archive.parent if lying_in_a_folder else archive)
  assert raw.sha256_of_files(found) == raw.sha256_of_files(raw.find_files(folder))
  assert str(found["labels"].rows) == f"{archive}/{prefix}lbl.json.gz"
  assert sorted(path.name for path in archive.parent.iterdir()) == [archive.name], "nothing is unpacked"


def test_rows_and_filters_can_be_in_two_archives_or_folders(tmp_path, folder):
  both = tmp_path / "both"
  rows = _pack(both / "LF-Amazon-131K.raw.zip", _contents(folder, ROWS, "LF-Amazon-131K/"))
  bow = _pack(both / "LF-AmazonTitles-131K.bow.tar.gz", _contents(folder, FILTERS, "LF-AmazonTitles-131K/"))
  found = raw.find_files(both)
  assert found["train"].rows.archive == rows and found["train"].filter.archive == bow
  unpacked = both / "LF-AmazonTitles-131K"
  unpacked.mkdir()
  for name, content in _contents(folder, FILTERS).items():
    (unpacked / name).write_bytes(content)
  assert raw.find_files(both)["test"].filter == unpacked / "filter_labels_test.txt", "folders come before archives"


def test_files_of_the_folder_come_before_nested_and_packed_ones(tmp_path, folder):
  other = miniature.write_raw_folder(folder / "old", seed=1)
  _pack(folder / "raw.zip", _contents(other, (*ROWS, *FILTERS)))
  found = raw.find_files(folder)
  assert {file.parent for files in found.values() for file in (files.rows, files.filter) if file} == {folder}


def test_filters_of_a_folder_with_rows_of_its_own_are_not_taken(folder):
  for name in FILTERS:
    (folder / name).unlink()
  miniature.write_raw_folder(folder / "other_set")
  assert raw.find_files(folder)["train"].filter is None


def test_two_places_with_rows_or_filters_are_refused(tmp_path, folder):
  two = tmp_path / "two"
  for name in ("a", "b"):
    _pack(two / f"{name}.zip", _contents(folder, ROWS))
  with pytest.raises(InputError, match=r"rows are in .*a.zip and in .*b.zip; set --config.dataset.raw_dir to one"):
    raw.find_files(two)
  for name in FILTERS:
    (folder / name).rename(folder.parent / name)
  for name in ("a", "b"):
    _pack(folder / f"{name}.tar.gz", _contents(folder.parent, FILTERS))
  with pytest.raises(InputError, match=r"filter files are in .*a.tar.gz and in .*b.tar.gz; keep one"):
    raw.find_files(folder)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_archive_with_a_file_twice_is_refused(tmp_path, folder, suffix):
  files = _contents(folder, ROWS, "a/") | _contents(folder, ROWS[:1], "b/")
  with pytest.raises(InputError, match=r"has trn.json.gz twice, as a/trn.json.gz and b/trn.json.gz; unpack"):
    raw.find_files(_pack(tmp_path / f"raw{suffix}", files))


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
@pytest.mark.parametrize("prefix", ["../", "a/../../", "/etc/"])
def test_path_that_leaves_the_archive_is_refused(tmp_path, folder, suffix, prefix):
  with pytest.raises(InputError, match="its path leaves the archive"):
    raw.find_files(_pack(tmp_path / f"raw{suffix}", _contents(folder, ROWS, prefix)))


def test_links_in_archives_are_refused(tmp_path):
  for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
    with tarfile.open(tmp_path / "raw.tar.gz", "w:gz") as archive:
      info = tarfile.TarInfo("trn.json.gz")
      info.type, info.linkname = kind, "/etc/passwd"
      archive.addfile(info)
    with pytest.raises(InputError, match=r"raw.tar.gz/trn.json.gz: is not a plain file"):
      raw.find_files(tmp_path / "raw.tar.gz")
  with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
    info = zipfile.ZipInfo("trn.json.gz")
    info.external_attr = 0o120777 << 16
    archive.writestr(info, "/etc/passwd")
  with pytest.raises(InputError, match=r"raw.zip/trn.json.gz: is a link"):
    raw.find_files(tmp_path / "raw.zip")


def test_encrypted_file_is_refused(tmp_path, folder):
  path = _pack(tmp_path / "raw.zip", _contents(folder, ROWS))
  content = bytearray(path.read_bytes())
  # The flags of every file are in its own header and in the list at the end.
  for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
    position = content.find(magic)
    while position >= 0:
      content[position + offset] |= 1
      position = content.find(magic, position + 1)
  path.write_bytes(content)
  with pytest.raises(InputError, match="raw.zip/trn.json.gz: is encrypted; unpack the archive with its password"):
    raw.find_files(path)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
@pytest.mark.parametrize("content", [b"", b"<html>too many downloads</html>", None])
def test_damaged_archive_is_named(tmp_path, folder, suffix, content):
  path = _pack(tmp_path / f"raw{suffix}", _contents(folder, ROWS))
  path.write_bytes(path.read_bytes()[:-60] if content is None else content)
  with pytest.raises(InputError, match=f"raw{suffix}: not a readable {suffix[1:]} archive .*; download it again"):
    raw.find_files(path)


def test_replaced_archive_is_listed_again(tmp_path, folder):
  path = _pack(tmp_path / "raw.zip", _contents(folder, ROWS))
  before = raw.sha256_of_files(raw.find_files(path))
  _pack(path, _contents(miniature.write_raw_folder(tmp_path / "other", seed=5), ROWS))
  assert raw.sha256_of_files(raw.find_files(path))["trn.json.gz"] != before["trn.json.gz"]


def test_images_in_an_archive_are_refused_before_anything_is_read(tmp_path, folder):
  files = _contents(folder, ROWS) | {"trn_images.parquet": b""}
  with pytest.raises(InputError, match="images are not read from archives; unpack it"):
    raw.find_files(_pack(tmp_path / "raw.zip", files))


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_members_are_read_line_by_line_and_in_pieces(tmp_path, suffix):
  lines = b"".join(b"%d\n" % i for i in range(300_000))
  path = _pack(tmp_path / f"raw{suffix}", {"before.txt": b"x" * 5000, "in/here.txt": lines, "after.txt": b"y" * 5000})
  member = archives.find_members(path, frozenset({"here.txt"}))["here.txt"]
  assert (member.name, member.size) == ("here.txt", len(lines))
  with member.open() as file:
    assert list(file) == lines.splitlines(keepends=True)
  with member.open() as file:
    assert file.read(3) + file.read(2_000_000) + file.read() == lines


def test_text_files_are_found_below_raw_data(tmp_path):
  place = tmp_path / "MM-AmazonTitles-300K"
  (place / "raw_data").mkdir(parents=True)
  names = ("train.raw.txt", "test.raw.txt", "label.raw.txt")
  for name in (*(f"raw_data/{name}" for name in names), "trn_X_Y.txt", "tst_X_Y.txt"):
    (place / name).touch()
  for raw_dir in (tmp_path, place):
    found = raw.find_files(raw_dir)
    assert [found[split].rows for split in ("train", "test", "labels")] == [place / "raw_data" / n for n in names]
    assert [found[split].targets for split in ("train", "test")] == [place / "trn_X_Y.txt", place / "tst_X_Y.txt"]
  (place / "tst_X_Y.txt").unlink()
  with pytest.raises(InputError, match=r"tst_X_Y.txt: missing; the folder must have train.raw.txt, trn_X_Y.txt"):
    raw.find_files(tmp_path)


def test_json_is_read_where_text_lies_beside_it(folder):
  for name in ("train.raw.txt", "test.raw.txt", "label.raw.txt", "trn_X_Y.txt", "tst_X_Y.txt"):
    (folder / name).touch()
  assert raw.find_files(folder)["train"].rows == folder / "trn.json.gz"
  assert raw.find_files(folder)["train"].targets is None


def test_truncated_member_of_an_archive_is_named_by_file_and_line(tmp_path, folder):
  content = gzip.compress(b'{"uid": "q", "title": "t"}\n' * 3, mtime=0)
  path = _pack(tmp_path / "raw.zip", _contents(folder, ROWS[:2]) | {"lbl.json.gz": content[:-4]})
  with pytest.raises(InputError, match=r"raw.zip/lbl.json.gz:\d+: the gzip file is truncated"):
    raw_records.count_rows(raw.find_files(path)["labels"].rows)
