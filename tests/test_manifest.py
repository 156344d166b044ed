"""Manifests: every damage is found and named; caches are made again; errors of the disk name the file."""

import errno
import os
import re

import pytest

from tests.helpers.damage import DAMAGES, files_of
from vixml_jax.errors import InputError
from vixml_jax.files import new_file, new_folder, writing
from vixml_jax.manifest import MANIFEST, cached_folder, check_folder, find_damage, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
  """A folder with two files and its manifest."""
  folder = tmp_path / "folder"
  (folder / "inner").mkdir(parents=True)
  (folder / "a").write_bytes(b"some bytes")
  (folder / "inner" / "b").write_bytes(b"other bytes")
  write_manifest(folder)
  return folder


def test_a_whole_folder_has_no_damage(folder):
  assert list(read_manifest(folder)) == ["a", "inner/b"]
  check_folder(folder, "delete it", contents=True)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["a", "inner/b", MANIFEST])
def test_any_damage_of_any_file_is_named(folder, name, kind):
  DAMAGES[kind](folder / name)
  with pytest.raises(InputError, match=rf"{folder / name}: .*; delete it$"):
    check_folder(folder, "delete it", contents=True)


def test_without_contents_only_sizes_are_compared(folder):
  files = read_manifest(folder)
  DAMAGES["flipped bit"](folder / "a")
  assert find_damage(folder, files, contents=False) is None
  with pytest.raises(InputError, match="a: is damaged"):
    check_folder(folder, "delete it", contents=False, and_contents_of=lambda name: name == "a")
  DAMAGES["cut off"](folder / "a")
  assert find_damage(folder, files, contents=False) == ("a", "has 5 bytes instead of 10")


def test_a_cache_is_written_once_and_again_when_it_is_damaged(tmp_path, caplog):
  written = []

  def write(work):
    written.append(work)
    (work / "a").write_bytes(b"contents")

  for _ in range(2):
    cached_folder(tmp_path / "cache", write)
  assert len(written) == 1 and not caplog.messages
  DAMAGES["flipped bit"](tmp_path / "cache" / "a")
  cached_folder(tmp_path / "cache", write)
  assert len(written) == 2 and (tmp_path / "cache" / "a").read_bytes() == b"contents"
  assert files_of(tmp_path) == ["cache.lock", "cache/a", f"cache/{MANIFEST}"]
  (line,) = caplog.messages
  assert line.startswith(f"{tmp_path}/cache/a: is damaged") and line.endswith("the folder is written again")


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError("5 requested and 3 written"),  # numpy's, which has no number.
    ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device"),  # TensorStore's.
  ],
  ids=["system", "numpy", "library"],
)
def test_a_full_disk_is_named_and_the_former_file_stays(tmp_path, error):
  (tmp_path / "file").write_text("former")
  message = f"{tmp_path}/file: cannot be written .No space left on device."
  with pytest.raises(InputError, match=message), new_file(tmp_path / "file") as work:
    work.write_text("new")
    raise error
  with pytest.raises(InputError, match=f"{tmp_path}/folder: cannot be written"), new_folder(tmp_path / "folder"):
    raise error
  assert files_of(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "former"


def test_other_errors_keep_their_class(tmp_path):
  for error in (OSError(errno.ENOENT, "gone"), ValueError("wrong"), InputError("bad")):
    with pytest.raises(type(error), match=re.escape(str(error))), writing(tmp_path):
      raise error
