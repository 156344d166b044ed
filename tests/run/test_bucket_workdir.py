"""Workdirs in buckets: what a kill or an outage leaves there, who may write, and that runs end with the same bits."""

import contextlib
import json
import logging
from pathlib import Path
import shutil

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers.miniature_runs import miniature_config, run_commands
import vixml_jax
from vixml_jax import remote
from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.files import write_json
from vixml_jax.manifest import MANIFEST, write_manifest
from vixml_jax.run import bucket_use, configuration
from vixml_jax.run.bucket_workdir import open_workdir
from vixml_jax.run.checkpoint_damage import newest_whole_step, put_back_replaced
from vixml_jax.search.snapshots import check_files, read_current, write_snapshot

URL = "memory://bucket/run"
_WRITES = ("put_file", "pipe_file", "cp_file", "rm")


class Killed(BaseException):
  """Stands for SIGKILL."""


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
  """fsspec's file system in memory, empty; a cache of its own; and no time between attempts."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(remote, "_RETRY_SECONDS", (0.0, 0.0))
  monkeypatch.setattr(bucket_use, "WAIT_SECONDS", 0.3)
  files = fsspec.filesystem("memory")
  for state in (files.store, files.pseudo_dirs):
    state.clear()
  yield files
  files.store.clear()


@pytest.fixture
def other_machine(tmp_path, monkeypatch):
  """Function that continues with an empty cache, as another machine has it."""
  numbers = iter(range(1000))
  return lambda: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{next(numbers)}"))


@contextlib.contextmanager
def writes(before):
  """Calls `before(operation, path)` before everything that is written to the bucket."""
  with pytest.MonkeyPatch.context() as patch:
    for name in _WRITES:
      patch.setattr(MemoryFileSystem, name, _announced(name, getattr(MemoryFileSystem, name), before))
    yield


def _announced(name, write, before):
  def announced(self, *args, **kwargs):
    before(name, args[1] if name in ("put_file", "cp_file") else args[0])
    return write(self, *args, **kwargs)

  return announced


def names(memory):
  return sorted(path.removeprefix("/bucket/run/") for path in memory.find("/bucket/run"))


def use(**values):
  return json.dumps({"cache": "other", "token": "t", "host": "far", "process": 7, "since": "noon"} | values).encode()


def write_step(folder, step, text):
  """Writes a checkpoint whose files tell its text."""
  (folder / f"checkpoints/{step}/model").mkdir(parents=True, exist_ok=True)
  (folder / f"checkpoints/{step}/model/data").write_text(text)
  (folder / f"checkpoints/{step}/model/data-{text}").write_text(text)
  (folder / f"checkpoints/{step}/_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"has_sha256": true}}')
  write_manifest(folder / f"checkpoints/{step}")


def remove_step(folder, step):
  for path in sorted((folder / f"checkpoints/{step}").rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  (folder / f"checkpoints/{step}").rmdir()


def write_index_of(folder, text):
  (folder / "index").mkdir(exist_ok=True)

  def fill(work):
    (work / "labels.npy").write_text(text)
    return {"text": text}

  write_snapshot(folder / "index", fill)


def write_old(folder):
  write_json(folder / "config.json", {})
  write_step(folder, 10, "old")
  write_index_of(folder, "old")


def found(folder):
  """Texts of the newest whole step and of the label index, which must be whole as well."""
  put_back_replaced(folder / "checkpoints")
  steps = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
  step = newest_whole_step(folder / "checkpoints", steps)
  snapshot = read_current(folder / "index")
  check_files(snapshot.path, snapshot.info["files"], contents=True)
  return f"{step} {(folder / f'checkpoints/{step}/model/data').read_text()}", snapshot.info["text"]


def next_step(folder):
  write_step(folder, 20, "new")
  remove_step(folder, 10)
  write_index_of(folder, "new")


def same_step(folder):
  remove_step(folder, 10)
  write_step(folder, 10, "new")
  write_index_of(folder, "new")


def start(place=URL):
  """Makes the workdir of the state before."""
  with open_workdir(place) as workdir:
    workdir.folder.mkdir()
    write_old(workdir.folder)


@pytest.mark.parametrize(("write", "new"), [(next_step, "20 new"), (same_step, "10 new")])
def test_a_kill_before_each_write_leaves_the_old_state_or_the_new_one(memory, other_machine, write, new):
  seen, count = set(), 0
  while True:
    memory.store.clear()
    other_machine()
    start()
    left, count = count, count + 1

    def kill(operation, path, left=left):
      if not path.endswith(bucket_use.NAME):
        kill.writes += 1
      if kill.writes > left:
        raise Killed

    kill.writes = 0
    try:
      with writes(kill), open_workdir(URL) as workdir:
        write(workdir.folder)
        workdir.saved()
    except Killed:
      pass
    here = found(workdir.folder)
    assert here == (new, "new")
    other_machine()
    with pytest.raises(InputError, match="wrong"), open_workdir(URL):
      raise InputError("a flag is wrong")  # A command that fails at once loses nothing.
    for move in (other_machine, lambda: None):  # Elsewhere, and then again in the same place.
      move()
      with open_workdir(URL) as again:
        state = found(again.folder)
        assert state[0] in ("10 old", new) and state[1] in ("old", "new"), (left, state)
        seen.add(state)
    assert not [name for name in names(memory) if "replaced" in name]
    if kill.writes <= left:
      break
  assert count > 8 and seen >= {("10 old", "old"), (new, "new")}
  assert state == (new, "new")


@pytest.mark.parametrize("write", [next_step, same_step])
def test_a_killed_process_is_continued_from_its_own_copy(memory, write):
  start()

  def kill(operation, path):
    if path.endswith(f"/{MANIFEST}"):
      kill.dead = True
    if kill.dead:
      raise Killed

  kill.dead = False
  with pytest.raises(Killed), writes(kill), open_workdir(URL) as workdir:
    write(workdir.folder)
  with open_workdir(URL) as workdir:
    assert found(workdir.folder)[1] == "new"
  assert memory.cat("/bucket/run/index/000002/labels.npy") == b"new"
  # An old step that was not removed before the kill is copied back, and is removed when the run saves its next one.
  assert memory.exists("/bucket/run/checkpoints/10/model/data-old") == (write is next_step)


@pytest.mark.parametrize("killed", [True, False])
def test_a_process_that_ends_while_it_saves_a_step_again_keeps_the_former_one(memory, other_machine, killed):
  start()

  def kill(operation, path):
    if kill.dead:
      raise Killed

  kill.dead = False
  with pytest.raises(Killed), writes(kill), open_workdir(URL) as workdir:
    (workdir.folder / "checkpoints/10").rename(workdir.folder / "checkpoints/10.replaced")
    write_step(workdir.folder, 10, "new")
    (workdir.folder / "checkpoints/10" / MANIFEST).unlink()
    kill.dead = killed
    raise Killed
  assert memory.cat("/bucket/run/checkpoints/10/model/data") == b"old"
  assert memory.exists(f"/bucket/run/checkpoints/10/{MANIFEST}")
  with open_workdir(URL) as workdir:
    assert found(workdir.folder) == ("10 old", "old")
  other_machine()
  with open_workdir(URL) as workdir:
    assert found(workdir.folder) == ("10 old", "old")


def test_hashes_are_sent_after_what_they_describe_and_files_are_removed_last(memory):
  start()
  order = []
  note = lambda operation, path: order.append((operation, path.removeprefix("/bucket/run/")))
  with writes(note), open_workdir(URL) as workdir:
    next_step(workdir.folder)
    (workdir.folder / "log.txt").write_text("line")
    memory.pipe("/bucket/run/top.partial/0", b"of another process")
    (workdir.folder / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
    (workdir.folder / "checkpoints" / "30.orbax-checkpoint-tmp" / "data").write_text("part")
    (workdir.folder / "x.json.incomplete").write_text("part")
  sent = [path for operation, path in order if operation == "put_file"]
  assert sent[-2:] == ["checkpoints/20/sha256.json", "index/CURRENT"]
  removed = [path for operation, path in order if operation == "rm"]
  assert removed[0] == "checkpoints/10/sha256.json"
  assert order.index(("rm", removed[0])) > order.index(("put_file", "index/CURRENT"))
  assert sorted(names(memory)) == sorted(
    [f"checkpoints/20/{name}" for name in ("_CHECKPOINT_METADATA", "model/data", "model/data-new", MANIFEST)]
    + ["config.json", "index/000002/index.json", "index/000002/labels.npy", "index/CURRENT", "log.txt"]
    + [bucket_use.NAME, "top.partial/0"]
  )


def test_only_what_has_changed_is_copied(memory, monkeypatch):
  start()
  got = []
  monkeypatch.setattr(
    MemoryFileSystem,
    "get_file",
    lambda self, name, path, _get=MemoryFileSystem.get_file, **kw: (got.append(name), _get(self, name, path, **kw)),
  )
  sent = []
  with writes(lambda operation, path: sent.append(path)), open_workdir(URL):
    pass
  assert not got and {Path(path).name for path in sent} == {bucket_use.NAME}
  memory.pipe("/bucket/run/config.json", b'{"a": 1}')
  memory.rm("/bucket/run/checkpoints/10", recursive=True)
  with open_workdir(URL) as workdir:
    assert (workdir.folder / "config.json").read_text() == '{"a": 1}'
    assert not list(workdir.folder.rglob("data*"))
  assert got == ["/bucket/run/config.json"]


def test_an_outage_is_repeated_then_logged_and_made_up_for(memory, caplog):
  start()
  calls = []

  def fail(operation, path):
    calls.append(path)
    raise OSError("the network is down")

  with open_workdir(URL) as workdir:
    next_step(workdir.folder)
    with writes(fail), caplog.at_level(logging.WARNING):
      workdir.saved()
    assert calls.count(calls[0]) == 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert "(the network is down)" in line and str(workdir.folder) in line
    assert not memory.exists("/bucket/run/checkpoints/20/sha256.json")
    workdir.saved()
    assert memory.exists("/bucket/run/checkpoints/20/sha256.json")


def test_each_write_may_fail_once(memory, other_machine):
  for left in range(40):
    memory.store.clear()
    other_machine()
    start()
    count = iter(range(10**6))

    def fail(operation, path, left=left, count=count):
      if next(count) == left:
        raise OSError("reset by peer")

    with writes(fail):
      # The first write shows that the bucket can be written, and is not repeated.
      with contextlib.suppress(InputError), open_workdir(URL) as workdir:
        same_step(workdir.folder)
      failed = next(count) > left
    if left:
      other_machine()
      with open_workdir(URL) as workdir:
        assert found(workdir.folder) == ("10 new", "new"), left
    if not failed:
      return
  raise AssertionError("more writes than expected")


def test_a_last_upload_that_fails_names_the_folder_which_the_next_start_sends(memory):
  start()

  def fail(operation, path):
    if not path.endswith(bucket_use.NAME):
      raise OSError("the network is down")

  message = "everything is in .*: start the same command again"
  with pytest.raises(InputError, match=message) as error, writes(fail), open_workdir(URL) as workdir:
    next_step(workdir.folder)
  assert str(workdir.folder) in str(error.value) and "\n" not in str(error.value)
  with open_workdir(URL) as workdir:
    assert found(workdir.folder) == ("20 new", "new")
  assert memory.cat("/bucket/run/checkpoints/20/model/data") == b"new"


def test_what_was_never_sent_is_set_aside_when_another_machine_went_on(memory, tmp_path, monkeypatch, caplog):
  start()

  def kill(operation, path):
    if not path.endswith(bucket_use.NAME):
      raise Killed

  with pytest.raises(Killed), writes(kill), open_workdir(URL) as workdir:
    first = workdir.folder
    write_index_of(first, "unsent")
    workdir.saved()
  memory.pipe("/bucket/run/used_by.json", use(ended=True))
  memory.pipe("/bucket/run/config.json", b'{"b": 2}')
  with caplog.at_level(logging.WARNING), open_workdir(URL) as workdir:
    assert workdir.folder == first and found(first)[1] == "old"
    assert (first / "config.json").read_text() == '{"b": 2}'
  aside = first.with_name("run.unsent")
  assert read_current(aside / "index").info["text"] == "unsent" and str(aside) in caplog.text


def test_a_workdir_in_use_is_refused_and_one_of_a_killed_process_is_taken_over(memory, monkeypatch, caplog):
  start()
  beats = iter(range(10**6))
  read = MemoryFileSystem.cat_file

  def renewed(self, path, **kwargs):
    return use(renewed=next(beats)) if path.endswith(bucket_use.NAME) else read(self, path, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(MemoryFileSystem, "cat_file", renewed)
    with pytest.raises(InputError, match=f"{URL}: is in use by process 7 of far, since noon; wait"), open_workdir(URL):
      raise AssertionError
  memory.pipe("/bucket/run/used_by.json", use(renewed=0, ended=False))
  with caplog.at_level(logging.WARNING), open_workdir(URL):
    assert "was in use by process 7 of far" in caplog.text
  assert json.loads(memory.cat("/bucket/run/used_by.json"))["ended"]


def test_a_process_that_was_cut_off_writes_nothing_over_its_successor(memory):
  start()
  message = "process 7 of far uses it since noon, so this process writes nothing more"
  with pytest.raises(InputError, match=message), open_workdir(URL) as workdir:
    memory.pipe("/bucket/run/used_by.json", use(renewed=0))
    next_step(workdir.folder)
    workdir.saved()
  assert memory.cat("/bucket/run/used_by.json") == use(renewed=0)
  assert not [name for name in names(memory) if name.startswith("checkpoints/20/")]


def test_a_process_says_from_time_to_time_that_it_still_runs(memory, monkeypatch):
  monkeypatch.setattr(bucket_use, "RENEW_SECONDS", 0.01)
  with open_workdir(URL):
    seen = set()
    while len(seen) < 3:
      seen.add(json.loads(memory.cat("/bucket/run/used_by.json"))["renewed"])


def test_two_processes_of_a_machine_do_not_use_one_workdir(memory):
  message = "another process on this machine uses it"
  with open_workdir(URL), pytest.raises(InputError, match=message), open_workdir(f"{URL}/"):
    raise AssertionError
  assert not memory.find("/bucket")  # Nothing was written.


def test_what_cannot_be_written_or_is_no_run_is_said_at_once(memory, monkeypatch):
  def fail(operation, path):
    raise PermissionError("Access Denied")

  with writes(fail), pytest.raises(InputError, match="cannot be reached .Access Denied.; check"), open_workdir(URL):
    raise AssertionError
  with pytest.raises(InputError, match=f"{URL}/config.json: no such file"), open_workdir(URL, exists=True):
    raise AssertionError
  monkeypatch.setattr("jax.process_count", lambda: 2)
  message = "serves one process, and this run has several; mount the bucket .gcsfuse"
  with pytest.raises(InputError, match=message), open_workdir(URL):
    raise AssertionError
  assert not memory.find("/bucket")


def test_an_error_names_the_url_and_not_the_copy(memory):
  start()
  with pytest.raises(InputError, match=f"^{URL}/index: is wrong$"), open_workdir(URL) as workdir:
    raise InputError(f"{workdir.folder}/index: is wrong")


def test_a_copy_that_is_deleted_while_it_is_used_removes_nothing_from_the_bucket(memory):
  start()
  before = names(memory)
  with pytest.raises(InputError, match="was deleted while it was in use"), open_workdir(URL) as workdir:
    shutil.rmtree(workdir.folder)
    write_step(workdir.folder, 20, "new")
  assert names(memory) == before


def test_a_copy_that_could_not_be_filled_leaves_the_bucket_as_it_was(memory, monkeypatch):
  start()
  before = names(memory)
  with open_workdir(URL) as workdir:
    pass
  shutil.rmtree(workdir.folder / "index")
  with open_workdir(URL):
    assert found(workdir.folder) == ("10 old", "old")
  assert names(memory) == before  # What is deleted between two commands is copied again.
  with monkeypatch.context() as patch:
    patch.setattr(MemoryFileSystem, "get_file", None)
    shutil.rmtree(workdir.folder / "index")
    with pytest.raises(InputError, match="cannot be reached"), open_workdir(URL):
      raise AssertionError
  assert names(memory) == before and json.loads(memory.cat("/bucket/run/used_by.json"))["ended"]


# With training.


def parameters(folder):
  step = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.restore(folder / "checkpoints" / str(step) / "model")
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def metrics(folder):
  final = json.loads((folder / "final_metrics.json").read_text())
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return (
    {key: value for key, value in final.items() if key not in ("train_seconds", "tokens_per_second")},
    [
      (line["step"], line["split"], {key: value for key, value in line["values"].items() if key != "train_seconds"})
      for line in lines
      if line["split"] != "goodput"
    ],
  )


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """A run in a local folder, and its config."""
  folder = tmp_path_factory.mktemp("local")
  config = miniature_config(folder / "place")
  config.train.epochs, config.checkpoint.every_steps = 2, 2
  config.eval.update(dict(blend=False, baselines=(), retrieval_augmented=False, retrieval_choose=False))
  train_and_evaluate(config, folder / "run")
  return config, folder / "run"


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax reads it from its own file.
def test_a_run_that_is_killed_while_it_sends_continues_elsewhere_with_the_same_bits(memory, local, other_machine):
  config, run = local

  def kill(operation, path):
    kill.dead = kill.dead or path.endswith("/checkpoints/4/sha256.json")
    if kill.dead and not path.endswith(bucket_use.NAME):  # A thread renews this one.
      raise Killed

  kill.dead = False
  with pytest.raises(Killed), writes(kill), open_workdir(URL) as workdir:
    train_and_evaluate(config, workdir.folder, saved=workdir.saved)
  assert "checkpoints/2/sha256.json" in names(memory) and "checkpoints/4/sha256.json" not in names(memory)
  other_machine()
  steps = []
  with open_workdir(URL) as workdir:
    train_and_evaluate(config, workdir.folder, saved=lambda: (workdir.saved(), steps.append(1)))
  total = len({json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()})
  assert 0 < len(steps) < total  # It has begun after step 2.
  other_machine()
  with open_workdir(URL) as copied:
    assert parameters(copied.folder) == parameters(run)
    assert metrics(copied.folder) == metrics(run)
    assert {path.relative_to(copied.folder).parts[0] for path in copied.folder.rglob("*")} == {
      path.relative_to(run).parts[0] for path in run.rglob("*")
    }


def test_the_python_interface_trains_loads_changes_and_saves_in_a_bucket(memory, local, other_machine):
  config, run = local
  memory.put(str(Path(config.dataset.raw_dir)), "/bucket/raw", recursive=True)
  dataset = vixml_jax.Dataset.from_folder("memory://bucket/raw", data_dir="memory://bucket/data")
  model = vixml_jax.train(dataset, config, workdir=URL)
  assert repr(model).startswith(f"Model('{URL}'")
  with open_workdir(URL) as workdir:
    assert metrics(workdir.folder) == metrics(run)
  assert memory.exists("/bucket/run/report.html")
  assert [name for name in memory.find("/bucket/data") if name.endswith("custom/1.0.0/sha256.json")]
  number = model.num_labels
  model.add_labels([{"uid": "otter", "title": "horse fish"}])
  assert model.num_labels == number + 1
  other_machine()
  again = vixml_jax.load(URL)
  assert again.num_labels == number + 1
  assert again.evaluate(["horse fish"], [["otter"]])["P@1"] == model.evaluate(["horse fish"], [["otter"]])["P@1"]
  again.delete_labels(["otter"])
  assert again.save("memory://bucket/saved") == "memory://bucket/saved"
  assert vixml_jax.load("memory://bucket/saved").num_labels == number
  with pytest.raises(InputError, match="memory://bucket/saved: exists"):
    again.save("memory://bucket/saved")
  other_machine()
  with open_workdir(URL, exists=True) as workdir:
    read = configuration.read(workdir.folder / "config.json")
    assert (read.dataset.raw_dir, read.dataset.data_dir) == ("memory://bucket/raw", "memory://bucket/data")
    final = evaluate_workdir(read, workdir.folder)
  assert final["P@1"] == metrics(run)[0]["P@1"]


def test_commands_refuse_what_only_local_folders_can_be(tmp_path):
  done = run_commands(
    {
      "study": ["study", "--study=seeds", "--config=configs/custom.py", "--output=gs://bucket/study"],
      "compare": ["evaluate", f"--workdir={tmp_path}", "--compare=gs://bucket/run"],
      "features": [
        "extract_features",
        "--config=configs/custom.py",
        "--config.dataset.data_dir=gs://bucket/data",
        "--checkpoint=x.npz",
        "--num_processes=2",
        "--process=0",
      ],
    },
    tmp_path,
  )
  for name, (status, stdout, stderr) in done.items():
    assert status == 1 and not stdout and stderr.count("\n") == 1 and "gs://bucket/" in stderr, (name, stderr)
  assert "mount the bucket" in done["features"][2] and "must be a local path" in done["compare"][2]
  assert "--output=gs://bucket/study: must be a local path" in done["study"][2]
