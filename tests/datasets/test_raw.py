"""The files of a raw folder: a missing one is named with what to do."""

import hashlib

import pytest

from tests.helpers import miniature
from vixml_jax.datasets import raw
from vixml_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
  return miniature.write_raw_folder(tmp_path / "raw", num_train=3, num_test=2, num_labels=4)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("trn.json.gz", "missing; the folder must have trn.json.gz, tst.json.gz, lbl.json.gz"),
    ("lbl.json.gz", "missing; the folder must have"),
    ("filter_labels_train.txt", "missing; .* create an empty file if there are none"),
    ("filter_labels_test.txt", "missing"),
  ],
)
def test_missing_file_is_named_with_what_to_do(folder, name, message):
  raw.check_folder(folder)
  (folder / name).unlink()
  with pytest.raises(InputError, match=message) as caught:
    raw.check_folder(folder)
  assert str(caught.value).startswith(f"{folder / name}: ")


def test_missing_folder_is_named(tmp_path):
  with pytest.raises(InputError, match="no such folder; set --config.dataset.raw_dir"):
    raw.check_folder(tmp_path / "nowhere")


def test_hashes_are_those_of_the_files_that_exist(folder):
  assert raw.sha256_of_files(folder) == {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
  }
