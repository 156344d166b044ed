"""Every file operation of every writer is disturbed, and the next start finds the old state or the new one.

`make test` disturbs some operations of the quick writers; `make test-faults` disturbs all of all writers.
"""

from pathlib import Path
import shutil

import pytest

from tests.faults.disk import FAULTS, POWER_CUTS, Disk, Killed, installed
from tests.faults.writers import WRITERS, Writer
from vixml_jax.errors import InputError

_AGAIN = 8  # Of so many cases, one writes once more.
_QUICK = ("config.json, again", "metrics.jsonl", "bank of features", "parts of predict")


def write(writer: Writer, folder: Path, disk: Disk) -> None:
  """Writes under the layer. An error must be one line that names a path of the folder."""
  try:
    with installed(disk):
      writer.write(folder)
  except Killed:
    pass
  except InputError as error:
    assert str(folder) in str(error) and "\n" not in str(error), error


def found(writer: Writer, folder: Path) -> object:
  """Returns what the next start finds; a line if it may be missing."""
  try:
    return writer.read(folder)
  except InputError as error:
    if not writer.may_be_missing:
      raise
    assert "\n" not in str(error)
    return "missing"


def allowed_states(name: str, writer: Writer, tmp_path: Path) -> tuple[list[object], Path, int]:
  """Returns the states that the next start may find, the folder of the old state, and the number of operations."""
  start = tmp_path / "start"
  start.mkdir()
  writer.start(start)
  new = shutil.copytree(start, tmp_path / "new")
  disk = Disk(new)
  with installed(disk):
    writer.write(new)
  states = [writer.read(new), *(["missing"] if writer.may_be_missing else [])]
  if writer.write is not writer.read and name != "parts of predict":
    states.append(writer.read(shutil.copytree(start, tmp_path / "old")))
  if name == "metrics.jsonl":  # Lines are appended one by one.
    states += [states[0][:count] for count in range(3, 7)]
  return states, start, len(disk.operations)


def disturb(name: str, fault: str, tmp_path: Path, every: int = 1) -> int:
  """Disturbs every n-th operation of a writer and returns how many that were."""
  writer = WRITERS[name]
  states, start, count = allowed_states(name, writer, tmp_path)
  assert count >= 3
  cases = range(1, count + 1, every)
  for at in cases:
    folder = shutil.copytree(start, tmp_path / "work")
    disk = Disk(folder, fault, at, tuple(folder / path for path in writer.unsynced))
    write(writer, folder, disk)
    if fault in POWER_CUTS:
      disk.power_cut()
    state = found(writer, folder)
    assert state in states, (name, fault, at, disk.operations[at - 1 : at], state)
    if at % _AGAIN == 1:
      writer.again(folder)
    shutil.rmtree(folder)
  return len(cases)


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_the_next_start_finds_the_old_state_or_the_new_one(tmp_path, fault):
  for name in _QUICK:
    (tmp_path / name).mkdir()
    disturb(name, fault, tmp_path / name, every=5)


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", WRITERS)
def test_after_a_fault_at_any_operation_the_next_start_finds_the_old_state_or_the_new_one(
  tmp_path, name, fault, record_property
):
  record_property(f"faults: {name}", disturb(name, fault, tmp_path))
