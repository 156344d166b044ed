"""Prepared sets in buckets: sent when made, copied where missing, and made again where the bucket lost them."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import pytest

from tests.helpers.miniature import write_raw_folder
from vixml_jax import remote
from vixml_jax.datasets.bucket_sets import local_raw_folder, prepare_shared, shared_sets
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.files import new_folder
from vixml_jax.manifest import MANIFEST, write_manifest
from vixml_jax.tables.conversion import convert_shared

URL = "memory://bucket/data"


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(remote, "_RETRY_SECONDS", (0.0, 0.0))
  files = fsspec.filesystem("memory")
  files.store.clear()
  yield files
  files.store.clear()


@pytest.fixture
def other_machine(tmp_path, monkeypatch):
  return lambda: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))


def make(text="a"):
  """Makes the set `custom/1.0.0` if it is missing, and returns its text."""
  with shared_sets(URL, "custom") as local:
    folder = local / "custom" / "1.0.0"
    if not folder.exists():
      with new_folder(folder) as work:
        (work / "part").mkdir()
        (work / "part" / "data").write_text(text)
        write_manifest(work)
    return (folder / "part" / "data").read_text()


def test_a_set_is_sent_once_and_found_elsewhere(memory, other_machine, monkeypatch):
  assert make() == "a"
  other_machine()
  assert make("b") == "a"
  monkeypatch.setattr(MemoryFileSystem, "get_file", None)
  monkeypatch.setattr(MemoryFileSystem, "put_file", None)
  assert make("b") == "a"


def test_a_set_that_was_not_sent_to_the_end_is_sent_again(memory, other_machine, monkeypatch):
  put = MemoryFileSystem.put_file

  def fail(self, path, name, **kwargs):
    if name.endswith(MANIFEST):
      raise OSError("the network is down")
    put(self, path, name, **kwargs)

  with monkeypatch.context() as patch, pytest.raises(InputError, match="the network is down"):
    patch.setattr(MemoryFileSystem, "put_file", fail)
    make()
  assert memory.exists("/bucket/data/custom/1.0.0/part/data")
  assert make("b") == "a" and memory.exists(f"/bucket/data/custom/1.0.0/{MANIFEST}")
  other_machine()
  assert make("b") == "a"


def test_a_set_that_was_deleted_in_the_bucket_is_made_again(memory):
  make()
  memory.rm("/bucket/data/custom", recursive=True)
  assert make("b") == "b"
  assert memory.cat("/bucket/data/custom/1.0.0/part/data") == b"b"


def test_a_damaged_set_is_named(memory, other_machine):
  make()
  memory.pipe("/bucket/data/custom/1.0.0/part/data", b"?")
  other_machine()
  with pytest.raises(InputError, match=f"{URL}/custom/1.0.0/part/data: is damaged .* delete {URL}/custom/1.0.0/"):
    make()


def test_a_bucket_that_cannot_be_written_is_said_before_the_work(memory, monkeypatch):
  def fail(self, path, value, **kwargs):
    raise PermissionError("Access Denied")

  monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
  with pytest.raises(InputError, match="Access Denied"), shared_sets(URL, "custom"):
    raise AssertionError


def test_several_processes_are_refused(monkeypatch):
  monkeypatch.setattr("jax.process_count", lambda: 2)
  with pytest.raises(InputError, match=f"data_dir={URL}: a bucket serves one process.*mount"), shared_sets(URL, "a"):
    raise AssertionError


def test_a_data_set_is_prepared_from_raw_files_of_a_bucket_into_one(memory, tmp_path, other_machine):
  raw = write_raw_folder(tmp_path / "raw", num_train=24)
  memory.put(str(raw), "/bucket/raw", recursive=True)
  near = prepare_shared("custom", raw, tmp_path / "near")
  far = prepare_shared("custom", "memory://bucket/raw", URL)
  other_machine()
  again = prepare_shared("custom", None, f"{URL}/")
  for split in ("train", "test", "labels"):
    titles = [
      [record.text(("title",)) for batch in Records(builder, split).batches() for record in batch]
      for builder in (near, far, again)
    ]
    assert titles[0] == titles[1] == titles[2] and titles[0]


def test_a_table_is_converted_into_a_bucket_and_found_elsewhere(memory, other_machine):
  rows = [{"text": f"{word} {i}", "labels": [word]} for i in range(20) for word in ("arrow", "cloud")]
  converted, raw_dir, data_dir = convert_shared(URL, rows)
  assert raw_dir == f"{data_dir}/raw" and data_dir.startswith(f"{URL}/table-")
  other_machine()
  folder = local_raw_folder(raw_dir, data_dir)
  assert folder != converted.folder and (folder / "trn.json.gz").exists()
  assert prepare_shared("custom", raw_dir, data_dir).info.splits["labels"].num_examples == 2
