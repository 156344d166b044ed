"""Labels are added, deleted and categorized as in a newly written index, and an interruption changes nothing."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests.helpers.search_cases import (
  CHECKPOINT,
  NUM_LABELS,
  NUM_TRAIN,
  both_kinds,
  brute_force,
  needs_scann,
  opened,
  unit,
  written,
)
import vixml_jax
from vixml_jax import manifest
from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file
from vixml_jax.ragged import Ragged
from vixml_jax.search import snapshots
from vixml_jax.search.label_index_files import is_edited

QUERIES = unit(9, 3)


def _files(folder):
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _members(index):
  return {name: index.filters(categories=[[name]]).allow.sets[0].tolist() for name in index.categories}


@both_kinds
def test_added_and_deleted_labels_are_searched_as_in_a_newly_written_index(tmp_path, search):
  index = opened(written(tmp_path / "index", search))
  former = index.search(QUERIES, 12)[1]
  new, names = unit(9, 5), [f"new {i}" for i in range(8)]
  edited = index.add(new[:8], names, names, np.arange(8), categories=[["even"]] * 7 + [["brand new"]])
  edited = edited.delete([0, 1, NUM_LABELS + 2])
  edited = edited.add(new[8:], ["back"], ["u/0"], [3])
  table = np.concatenate([unit(NUM_LABELS, 0), new])
  live = ~np.isin(np.arange(len(table)), [0, 1, NUM_LABELS + 2])
  scores, ids = edited.search(QUERIES, 12)
  expected_scores, expected_ids = brute_force(table, QUERIES, 12, live[None])
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-6)
  fresh = opened(written(tmp_path / "fresh", search, num_labels=len(table), embeddings=table, deleted=~live))
  np.testing.assert_array_equal(fresh.search(QUERIES, 12)[1], ids)
  np.testing.assert_array_equal(index.search(QUERIES, 12)[1], former)  # An open snapshot does not change.
  assert (edited.num_labels, edited.num_live, edited.info["edits"]) == (NUM_LABELS + 9, live.sum(), 3)
  assert edited.ids_of(["new 3", "u/0"]).tolist() == [NUM_LABELS + 3, NUM_LABELS + 8]
  assert edited.texts([2, NUM_LABELS, NUM_LABELS + 8]) == ["label 2 é ü", "new 0", "back"]
  assert edited.label_clusters[[5, NUM_LABELS + 7, NUM_LABELS + 8]].tolist() == [1, 7, 3]
  assert {NUM_LABELS, 2} < {*_members(edited)["even"]} and _members(edited)["brand new"] == [NUM_LABELS + 7]
  np.testing.assert_array_equal(
    edited.query_index.search(QUERIES, 12)[1], brute_force(unit(NUM_TRAIN, 2), QUERIES, 12)[1]
  )


@both_kinds
def test_labels_are_replaced_and_their_queries_join_the_training_queries_in_one_step(tmp_path, search):
  index = opened(written(tmp_path / "index", search))
  queries = unit(3, 12)
  edited = index.add(
    unit(2, 11),
    ["new", "again"],
    ["new", "u/7"],
    [1, 2],
    queries=queries,
    query_labels=Ragged.from_rows([[0], [0, 1], [1]]),
    query_texts=["first", "second", "third ü"],
    delete=[7],
  )
  first, second = NUM_LABELS, NUM_LABELS + 1
  assert edited.info["edits"] == 1 and edited.ids_of(["u/7"]).tolist() == [second]
  found = edited.query_index.search(queries, 1)[1][:, 0]
  assert found.tolist() == [NUM_TRAIN, NUM_TRAIN + 1, NUM_TRAIN + 2]
  assert [edited.query_labels[row].tolist() for row in found] == [[first], [first, second], [second]]
  assert edited.query_texts.take([0, *found]) == ["query 0 ß", "first", "second", "third ü"]
  assert not np.isin(7, edited.search(queries, NUM_LABELS)[1])
  opened(tmp_path / "index", verify=True)


def test_an_index_without_training_queries_ignores_those_of_new_labels(tmp_path):
  index = opened(written(tmp_path / "index", queries=None, query_labels=None))
  edited = index.add(unit(1, 11), ["new"], ["new"], [1], queries=unit(1, 12), query_labels=Ragged.from_rows([[0]]))
  assert "queries.npy" not in edited.info["files"] and edited.num_live == NUM_LABELS + 1


def test_texts_of_training_queries_are_kept_by_every_edit_and_stay_absent_in_an_older_index(tmp_path):
  edits = [
    lambda index: index.add(unit(1, 11), ["new"], ["new"], [1]),
    lambda index: index.delete([3]),
    lambda index: index.categorize([4], [["new"]]),
  ]
  index, older = opened(written(tmp_path / "index")), opened(written(tmp_path / "older", query_texts=None))
  for edit in edits:
    index, older = edit(index), edit(older)
    assert index.query_texts.take([0, NUM_TRAIN - 1]) == ["query 0 ß", f"query {NUM_TRAIN - 1} ß"]
    assert older.query_texts is None
  new = dict(queries=unit(1, 12), query_labels=Ragged.from_rows([[0]]))
  with pytest.raises(ValueError, match="needs those of new ones"):
    index.add(unit(1, 13), ["other"], ["other"], [1], **new)
  older = older.add(unit(1, 13), ["other"], ["other"], [1], **new, query_texts=["other query"])
  assert older.query_texts is None and len(older.query_labels) == NUM_TRAIN + 1


@both_kinds
@pytest.mark.parametrize("before", [None, [["old"]] * NUM_LABELS], ids=["without categories", "with categories"])
def test_categories_of_labels_are_replaced(tmp_path, search, before):
  index = opened(written(tmp_path / "index", search, categories=before))
  found = index.search(QUERIES, 12)
  edited = index.categorize([4, 2], [["new", "other"], []])
  old = {"old": [i for i in range(NUM_LABELS) if i not in (2, 4)]} if before else {}
  assert _members(edited) == {"new": [4], "other": [4]} | old
  for actual, expected in zip(edited.search(QUERIES, 12), found, strict=True):
    np.testing.assert_array_equal(actual, expected)
  with pytest.raises(InputError, match=f"there is no label {NUM_LABELS}"):
    edited.categorize([NUM_LABELS], [["new"]])


def test_former_snapshots_are_removed_and_unchanged_files_are_linked_and_not_read(tmp_path, monkeypatch):
  folder = tmp_path / "index"
  index = opened(written(folder))
  before = (folder / "000001" / "queries.npy").stat().st_ino
  read = []
  monkeypatch.setattr(manifest, "sha256_of_file", lambda path: read.append(path.name) or sha256_of_file(path))
  index.delete([1]).delete([2])
  assert read == ["deleted.npy"] * 2
  assert sorted(path.name for path in folder.iterdir()) == [".lock", "000003", "CURRENT"]
  assert (folder / "000003" / "queries.npy").stat().st_ino == before
  opened(folder, verify=True)


def test_a_second_process_adds_to_what_the_first_one_wrote(tmp_path):
  first = opened(written(tmp_path / "index"))
  second = opened(tmp_path / "index")
  first.add(unit(1, 8), ["a"], ["a"], [0])
  both = second.add(unit(1, 9), ["b"], ["b"], [0])
  assert both.ids_of(["a", "b"]).tolist() == [NUM_LABELS, NUM_LABELS + 1]


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda index: index.add(unit(2, 8), ["a", "b"], ["a", "u/7"], [0, 0]), "'u/7' is already in .*; delete it first"),
    (lambda index: index.add(unit(2, 8), ["a", "b"], ["a", "a"], [0, 0]), "'a' is used by two new labels"),
    (lambda index: index.delete([3, NUM_LABELS]), f"no label {NUM_LABELS}; ids are from 0 to {NUM_LABELS - 1}"),
    (lambda index: index.delete([-1]), "no label -1"),
    (lambda index: index.delete(range(NUM_LABELS)), "no label would remain"),
  ],
)
def test_impossible_edits_are_refused_and_change_nothing(tmp_path, edit, message):
  index = opened(written(tmp_path / "index"))
  before = _files(tmp_path / "index")
  with pytest.raises(InputError, match=message):
    edit(index)
  assert _files(tmp_path / "index") == before
  assert not is_edited(tmp_path / "index", CHECKPOINT)


def test_embeddings_of_another_dimension_are_refused(tmp_path):
  index = opened(written(tmp_path / "index"))
  with pytest.raises(ValueError, match=r"shape \(1, 5\) instead of \[n, 8\]"):
    index.add(unit(1, 8, dim=5), ["a"], ["a"], [0])


@needs_scann
def test_scann_is_rebuilt_when_over_a_tenth_of_the_labels_has_changed(tmp_path, caplog):
  index = opened(written(tmp_path / "index", "scann", queries=None, query_labels=None))
  with caplog.at_level("INFO"):
    index = index.delete(range(5))
    assert "rebuilding" not in caplog.text
    index = index.add(unit(3, 8), list("abc"), list("abc"), [0, 0, 0])
    assert caplog.text.count("rebuilding") == 1
  np.testing.assert_array_equal(index.search(unit(3, 8), 1)[1].ravel(), np.arange(NUM_LABELS, NUM_LABELS + 3))


@pytest.mark.parametrize(
  ("owner", "name"),
  [
    pytest.param(manifest, "sha256_of_file", id="while files are written"),
    pytest.param(Path, "rename", id="before the snapshot is complete"),
    pytest.param(snapshots, "new_file", id="before CURRENT is written"),
    pytest.param(Path, "replace", id="before CURRENT is replaced"),
  ],
)
def test_an_interruption_leaves_the_former_index_and_the_next_edit_works(tmp_path, monkeypatch, owner, name):
  index = opened(written(tmp_path / "index"))

  def interrupt(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(owner, name, interrupt)
    index.delete([1])
  assert opened(tmp_path / "index").num_live == NUM_LABELS
  assert index.delete([2]).num_live == NUM_LABELS - 1
  assert len([path for path in (tmp_path / "index").iterdir() if path.is_dir()]) == 1


def test_a_killed_process_leaves_the_former_index(tmp_path):
  folder = written(tmp_path / "index")
  code = textwrap.dedent("""
      import os, signal, sys
      from vixml_jax.search import label_index, snapshots
      snapshots.new_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)
      label_index.LabelIndex.open(sys.argv[1], checkpoint=None).delete([1])
      """)
  environment = os.environ | {"PYTHONPATH": str(Path(vixml_jax.__file__).parents[1])}
  done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert (folder / "000002").is_dir()
  assert opened(folder).num_live == NUM_LABELS
  assert opened(folder).delete([2]).num_live == NUM_LABELS - 1
  assert json.loads((folder / "000003" / "index.json").read_text())["num_deleted"] == 1
