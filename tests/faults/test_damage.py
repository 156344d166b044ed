"""Every file of every stored folder is damaged in every way; it is noticed before it is used, or made again."""

from pathlib import Path
import shutil

import pytest

from tests.faults.disk import Disk, Killed, installed
from tests.faults.writers import WRITERS
from tests.helpers.damage import DAMAGES, files_of
from vixml_jax.errors import InputError
from vixml_jax.inference.part_store import RECORDS
from vixml_jax.manifest import MANIFEST
from vixml_jax.run.checkpoint import Checkpointer

pytestmark = pytest.mark.faults
_CACHES = ("bank of features", "tokens")


def damaged_copies(whole: Path, work: Path, swapped_with: Path | None = None):
  """Yields folders in which one file is damaged, with its name and what was done to it."""
  ways = dict(DAMAGES)
  if swapped_with is not None:
    ways["of another run"] = lambda path: shutil.copy(swapped_with / path.relative_to(work), path)
  for name in (name for name in files_of(whole) if (whole / name).stat().st_size):  # Locks are empty.
    for kind, damage in ways.items():
      shutil.rmtree(work, ignore_errors=True)
      shutil.copytree(whole, work)
      before = (work / name).read_bytes()
      try:
        damage(work / name)
      except FileNotFoundError:
        continue  # The other run has no such file.
      if not (work / name).exists() or (work / name).read_bytes() != before:
        yield work, name, kind


def test_the_step_before_a_damaged_one_is_used(tmp_path, record_property):
  whole, cases = tmp_path / "whole", 0
  whole.mkdir()
  WRITERS["checkpoint"].start(whole)
  WRITERS["checkpoint"].write(whole)
  for folder, name, kind in damaged_copies(whole, tmp_path / "work"):
    if name.startswith("checkpoints/3/"):
      with Checkpointer(folder / "checkpoints", 2) as checkpointer:
        assert checkpointer.step_to_resume() == 2, (name, kind)
      cases += 1
  record_property("damage: checkpoint", cases)


def test_a_damaged_index_is_refused(tmp_path, record_property):
  writer, cases = WRITERS["label index, delete"], 0
  for name in ("whole", "other"):
    (tmp_path / name).mkdir()
  writer.start(tmp_path / "whole")
  writer.write(tmp_path / "whole")
  WRITERS["label index, write"].write(tmp_path / "other")
  (tmp_path / "other" / "index" / "000001").rename(tmp_path / "other" / "index" / "000002")
  for folder, name, kind in damaged_copies(tmp_path / "whole", tmp_path / "work", tmp_path / "other"):
    with pytest.raises(InputError) as error:
      writer.read(folder)
    assert str(folder / "index") in str(error.value) and "\n" not in str(error.value), (name, kind)
    cases += 1
  record_property("damage: label index", cases)


@pytest.mark.parametrize("name", _CACHES)
def test_a_damaged_cache_is_made_again(tmp_path, record_property, name):
  writer, cases = WRITERS[name], 0
  whole = tmp_path / "whole"
  whole.mkdir()
  writer.start(whole)
  expected = writer.read(whole)
  for folder, _, _ in damaged_copies(whole, tmp_path / "work"):
    assert writer.read(folder) == expected
    cases += 1
  record_property(f"damage: {name}", cases)


def test_a_damaged_prepared_set_is_refused(tmp_path, record_property):
  writer, cases = WRITERS["prepared set"], 0
  whole = tmp_path / "whole"
  whole.mkdir()
  writer.start(whole)
  expected = writer.read(whole)
  for folder, name, kind in damaged_copies(whole, tmp_path / "work"):
    cases += 1
    try:
      found = writer.read(folder)
    except InputError as error:
      assert str(folder) in str(error) and "\n" not in str(error), (name, kind)
    else:  # Files of other splits, locks, and a set as an earlier version wrote it.
      assert found == expected
      assert "train" not in name or name.endswith(".lock"), (name, kind)
      assert "json" not in name or (name.endswith(MANIFEST) and kind == "missing"), (name, kind)
  record_property("damage: prepared set", cases)


def test_damaged_parts_of_predict_are_answered_again(tmp_path, record_property):
  writer, cases = WRITERS["parts of predict"], 0
  whole = tmp_path / "whole"
  whole.mkdir()
  writer.start(whole)
  expected = writer.read(shutil.copytree(whole, tmp_path / "undisturbed"))
  disk = Disk(whole)
  with installed(disk):
    writer.write(whole)
  count = len(disk.operations)
  shutil.rmtree(whole)
  whole.mkdir()
  writer.start(whole)
  with pytest.raises(Killed), installed(Disk(whole, "kill", count // 2)):
    writer.write(whole)
  assert len(list((whole / "out" / "top.jsonl.partial").glob(f"*/{RECORDS}/*"))) > 1
  for folder, name, kind in damaged_copies(whole, tmp_path / "work"):
    if name == "q.jsonl":
      continue
    cases += 1
    try:
      assert writer.read(folder) == expected, (name, kind)
    except InputError as error:
      assert "job.json" in name and "delete" in str(error), (name, kind)
  record_property("damage: parts of predict", cases)
