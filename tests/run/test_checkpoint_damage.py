"""A damaged or unfinished checkpoint is noticed before it is used, and the newest whole one is used instead."""

import json
import re
import resource
import shutil

import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from tests.helpers.damage import DAMAGES, files_of, flip_a_bit
from tests.run.test_checkpoint import NUM_QUERIES, abstract_on
from vixml_jax import manifest, sharding
from vixml_jax.errors import InputError
from vixml_jax.manifest import MANIFEST
from vixml_jax.run import checkpoint as checkpoint_module
from vixml_jax.run import checkpoint_damage
from vixml_jax.run.checkpoint import Checkpoint, Checkpointer, checkpoint_id, newest_checkpoint


@pytest.fixture(scope="module")
def abstract():
  return abstract_on(sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def state(abstract):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jax.device_put(rng.normal(0, 9, leaf.shape).astype(leaf.dtype), leaf.sharding), abstract
  )


def save(folder, state, *steps, keep=2):
  with Checkpointer(folder, keep) as checkpointer:
    for step in steps:
      checkpointer.save(step, Checkpoint(state, None, {"step": step}))
  return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
  """Folder of the checkpoints 3 and 4; tests copy it."""
  return save(tmp_path_factory.mktemp("saved"), state, 3, 4)


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def step_to_resume(folder):
  with Checkpointer(folder, 2) as checkpointer:
    return checkpointer.step_to_resume()


def without_hashes(step):
  """Makes a step one of a version that stored no hashes."""
  (step / MANIFEST).unlink()
  path = step / "_CHECKPOINT_METADATA"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))


def check_damage(saved, work, damage, name, caplog):
  """Damages a file of step 4, and checks that step 3 is used instead and that the file is named."""
  shutil.rmtree(work, ignore_errors=True)
  shutil.copytree(saved, work)
  damage(work / "4" / name)
  caplog.clear()
  assert step_to_resume(work) == 3, name
  (line,) = (record.getMessage() for record in caplog.records if record.name.startswith("vixml_jax"))
  if name == MANIFEST and not (work / "4.damaged" / name).exists():
    assert "4: is not used, since its process ended before it was saved whole" in line
  else:
    assert f"{work}/4/{name}: is damaged" in line and line.endswith("step 3 is used instead"), line
  assert sorted(path.name for path in work.iterdir()) == ["3", "4.damaged"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_the_step_before_is_used(saved, tmp_path, caplog, kind):
  names = files_of(saved / "4")
  largest = max(names, key=lambda name: (saved / "4" / name).stat().st_size)
  for name in (largest, "_CHECKPOINT_METADATA", "meta/metadata", MANIFEST):
    check_damage(saved, tmp_path / "work", DAMAGES[kind], name, caplog)


def test_a_flipped_bit_in_any_file_is_noticed(saved, tmp_path, caplog):
  for name in files_of(saved / "4"):
    check_damage(saved, tmp_path / "work", flip_a_bit, name, caplog)


def test_a_file_of_another_step_is_noticed(saved, tmp_path, caplog):
  check_damage(
    saved, tmp_path / "work", lambda path: shutil.copy(saved / "3/meta/metadata", path), "meta/metadata", caplog
  )


def test_a_step_that_was_damaged_is_saved_again(copy, abstract, state):
  flip_a_bit(copy / "4/meta/metadata")
  with Checkpointer(copy, 2) as checkpointer:
    assert checkpointer.step_to_resume() == checkpointer.latest_step() == 3
    checkpointer.save(4, Checkpoint(state, None, {"step": "again"}))
  assert files_of(copy / "4") and sorted(path.name for path in copy.iterdir()) == ["3", "4"]
  with Checkpointer(copy, 2) as checkpointer:
    assert checkpointer.step_to_resume() == 4
    assert checkpointer.restore(4, abstract, NUM_QUERIES).meta == {"step": "again"}


def test_without_a_whole_checkpoint_the_damaged_file_is_named(copy):
  for step in ("3", "4"):
    flip_a_bit(copy / step / "meta/metadata")
  for read in (step_to_resume, newest_checkpoint):
    with pytest.raises(InputError, match=re.escape(f"{copy}/4/meta/metadata: is damaged")) as error:
      read(copy)
    assert "no other checkpoint is whole; restore the file, or use another --workdir" in str(error.value)
  assert sorted(path.name for path in copy.iterdir()) == ["3", "4"], "nothing was renamed"


def test_inference_reads_the_step_before_if_the_model_of_the_newest_is_damaged(copy, caplog):
  model = next(name for name in files_of(copy / "4") if name.startswith("model/d/"))
  flip_a_bit(copy / "4" / next(name for name in files_of(copy / "4") if name.startswith("training/d/")))
  assert newest_checkpoint(copy) == (4, {"step": 4}), "inference does not read the state of training"
  flip_a_bit(copy / "4" / model)
  assert newest_checkpoint(copy) == (3, {"step": 3})
  assert f"{copy}/4/{model}: is damaged" in caplog.text and "step 3 is used instead" in caplog.text
  with Checkpointer(copy, 2) as checkpointer:
    assert checkpointer.newest_whole_step() == 3
  assert sorted(path.name for path in copy.iterdir()) == ["3", "4"], "nothing was renamed"


def test_a_checkpoint_of_a_version_without_hashes_is_used_and_the_log_says_that_it_is_not_checked(copy, caplog):
  identity = checkpoint_id(copy, 4)
  without_hashes(copy / "4")
  with caplog.at_level("INFO"):
    assert step_to_resume(copy) == 4
  assert f"{copy}/4: was saved by a version that stored no hashes, so it is not checked" in caplog.text
  assert checkpoint_id(copy, 4) == identity, "indexes of earlier versions stay valid"


def test_a_damaged_checkpoint_without_hashes_is_one_line(copy, abstract):
  without_hashes(copy / "4")
  for name in [name for name in files_of(copy / "4") if "/d/" in name]:
    (copy / "4" / name).write_bytes(b"")
  with Checkpointer(copy, 2) as checkpointer, pytest.raises(InputError, match="does not fit this config or is damaged"):
    checkpointer.restore(4, abstract, NUM_QUERIES)


def test_the_former_checkpoint_stays_until_the_newest_has_its_hashes(tmp_path, state, monkeypatch, caplog):
  save(tmp_path, state, 1, keep=1)

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(checkpoint_module, "write_manifest", killed)
    save(tmp_path, state, 2, keep=1)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
  assert step_to_resume(tmp_path) == 1
  assert "2: is not used, since its process ended before it was saved whole" in caplog.text
  save(tmp_path, state, 2, keep=1)
  assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_run_that_was_killed_while_it_saved_its_first_checkpoint_starts_again(tmp_path, state):
  save(tmp_path, state, 1)
  (tmp_path / "1" / MANIFEST).unlink()
  assert step_to_resume(tmp_path) is None
  with pytest.raises(InputError, match="contains no checkpoint; train first"):
    newest_checkpoint(tmp_path)
  save(tmp_path, state, 1)
  assert step_to_resume(tmp_path) == 1 and [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons its other writes.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_full_disk_is_one_line_and_the_former_checkpoint_stays(tmp_path, state):
  # A limit on the size of files: the threads of TensorStore get an error from the operating system when they write.
  save(tmp_path, state, 1)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    with pytest.raises(InputError, match="2: cannot be written (.*); nothing that was stored before is lost"):
      save(tmp_path, state, 2)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert step_to_resume(tmp_path) == 1
  save(tmp_path, state, 2)
  assert step_to_resume(tmp_path) == 2


def test_each_of_several_processes_reads_a_share_of_the_files(saved, monkeypatch):
  read = []
  monkeypatch.setattr(manifest, "sha256_of_file", lambda path: read.append(path.name) or "other")
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: np.array([-1, value, -1, -1]))
  files = manifest.read_manifest(saved / "4")
  assert checkpoint_damage._find_shared(saved / "4", files) is not None
  assert 0 < len(read) <= -(-len(files) // 4)
