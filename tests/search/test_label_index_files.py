"""Damaged and foreign index files are named with what to do; writing an index checks its contents."""

import shutil

import numpy as np
import pytest

from tests.helpers.search_cases import (
  CHECKPOINT,
  NUM_LABELS,
  NUM_TRAIN,
  OTHER_CHECKPOINT,
  index_contents,
  needs_scann,
  opened,
  unit,
  written,
)
from vixml_jax.errors import InputError
from vixml_jax.search import label_index_files, snapshots
from vixml_jax.search.label_index_files import is_edited, write_index


@needs_scann
def test_recall_of_scann_is_measured_logged_and_stored(tmp_path, caplog):
  with caplog.at_level("INFO"):
    index = opened(written(tmp_path / "index", "scann"))
  measured = dict(index.info["recall"])
  assert measured.pop("queries_per_second") > 0
  assert measured == {"recall@10": 100, "recall@100": 100, "queries": NUM_TRAIN, "of": "training queries"}
  assert index.info["search"]["parameters"]["reorder"] == 0
  assert f"100.00 % (recall@10), 100.00 % (recall@100), on {NUM_TRAIN} training queries, at " in caplog.text


def test_two_labels_of_one_uid_are_refused(tmp_path):
  with pytest.raises(InputError, match="'twice' is used by two labels"):
    written(tmp_path / "index", uids=["twice", *(f"u/{i}" for i in range(NUM_LABELS - 2)), "twice"])


def test_an_unknown_kind_of_search_is_refused(tmp_path):
  with pytest.raises(InputError, match="search='faiss' is not known: use one of exact, scann"):
    write_index(tmp_path / "index", index_contents(), checkpoint=CHECKPOINT, search="faiss")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(texts=["a"]), "different numbers of labels: .*'texts': 1"),
    (dict(query_labels=None), "must be given together"),
    (dict(query_texts=["a"]), "1 texts of training queries: there must be 40"),
  ],
)
def test_contents_of_different_lengths_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    index_contents(**changes)


def _truncate(snapshot):
  path = snapshot / "labels.npy"
  path.write_bytes(path.read_bytes()[:-5])


def _flip_a_bit(snapshot):
  path = snapshot / "labels.npy"
  content = bytearray(path.read_bytes())
  content[-9] ^= 1
  path.write_bytes(content)


def _change_index_json(snapshot):
  path = snapshot / "index.json"
  path.write_text(path.read_text().replace("0.9", "0.8"))


@pytest.mark.parametrize(
  ("damage", "named"),
  [
    pytest.param(_truncate, "labels.npy", id="truncated file"),
    pytest.param(_flip_a_bit, "labels.npy", id="flipped bit"),
    pytest.param(lambda snapshot: (snapshot / "labels.npy").unlink(), "labels.npy", id="missing file"),
    pytest.param(lambda snapshot: (snapshot.parent / "CURRENT").unlink(), "CURRENT", id="missing CURRENT"),
    pytest.param(lambda snapshot: (snapshot.parent / "CURRENT").write_text(""), "CURRENT", id="empty CURRENT"),
    pytest.param(lambda snapshot: (snapshot / "index.json").unlink(), "index.json", id="missing index.json"),
    pytest.param(_change_index_json, "index.json", id="changed index.json"),
  ],
)
def test_damage_is_named_with_what_to_do(tmp_path, damage, named):
  folder = written(tmp_path / "run" / "index")
  damage(folder / "000001")
  with pytest.raises(InputError, match=named) as error:
    opened(folder)
  assert f"python -m vixml_jax.evaluate --workdir={tmp_path / 'run'}" in str(error.value)
  assert "\n" not in str(error.value)


def test_without_verification_only_sizes_are_compared(tmp_path):
  folder = written(tmp_path / "index")
  _flip_a_bit(folder / "000001")
  opened(folder, verify=False)
  _truncate(folder / "000001")
  with pytest.raises(InputError, match=r"labels.npy: is damaged \(has 2,043 bytes instead of 2,048\)"):
    opened(folder, verify=False)


def test_a_header_that_numpy_cannot_read_is_named_without_verification(tmp_path):
  folder = written(tmp_path / "index")
  path = folder / "000001" / "labels.npy"
  path.write_bytes(path.read_bytes().replace(b"descr", b"descR"))
  with pytest.raises(InputError, match=r"000001: cannot be read .*python -m vixml_jax.evaluate"):
    opened(folder, verify=False)


def test_an_index_of_another_checkpoint_is_refused_unless_any_is_accepted(tmp_path):
  folder = written(tmp_path / "index")
  with pytest.raises(InputError, match=r"another checkpoint \(step 7, sha256 abababababab\).*\(step 9, sha256 cdcdcd"):
    opened(folder, checkpoint=OTHER_CHECKPOINT)
  assert opened(folder, checkpoint=None).num_labels == NUM_LABELS


def test_an_index_of_another_format_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(label_index_files, "FORMAT", 99)
    folder = written(tmp_path / "index")
  with pytest.raises(InputError, match=r"format 99, but this version reads format 1; delete .*index and run"):
    opened(folder)


def test_a_snapshot_that_is_replaced_while_it_is_opened_is_opened_again(tmp_path, monkeypatch):
  folder = written(tmp_path / "index")
  check = snapshots.check_files

  def replace_first(snapshot, *arguments, **options):
    if snapshot.name == "000001":
      monkeypatch.setattr(snapshots, "check_files", check)
      shutil.rmtree(snapshot)
      written(folder, num_labels=50)
      (folder / "000001").rename(folder / "000002")
      (folder / "CURRENT").write_text((folder / "CURRENT").read_text().replace("000001", "000002"))
    return check(snapshot, *arguments, **options)

  monkeypatch.setattr(snapshots, "check_files", replace_first)
  assert opened(folder).num_labels == 50


def test_only_an_edited_index_of_the_checkpoint_counts_as_edited(tmp_path):
  folder = tmp_path / "index"
  assert not is_edited(folder, CHECKPOINT)
  index = opened(written(folder))
  assert not is_edited(folder, CHECKPOINT)
  index.delete([1])
  assert is_edited(folder, CHECKPOINT) and not is_edited(folder, OTHER_CHECKPOINT)
  written(folder)
  assert not is_edited(folder, CHECKPOINT)


@pytest.mark.parametrize("damaged", ["CURRENT", "index.json"])
def test_a_damaged_index_is_not_taken_for_one_without_edits(tmp_path, damaged):
  folder = tmp_path / "index"
  opened(written(folder)).delete([1])
  (path,) = folder.rglob(damaged)
  path.write_bytes(path.read_bytes()[:-3] + b"x")
  with pytest.raises(InputError, match=damaged):
    is_edited(folder, CHECKPOINT)


@needs_scann
def test_recall_is_measured_on_labels_if_there_are_no_training_queries(tmp_path):
  deleted = np.arange(NUM_LABELS) < 10
  index = opened(
    written(
      tmp_path / "index", "scann", queries=None, query_labels=None, deleted=deleted, embeddings=unit(NUM_LABELS, 4)
    )
  )
  measured = {name: index.info["recall"][name] for name in ("recall@10", "recall@100", "queries", "of")}
  assert measured == {"recall@10": 100, "recall@100": 100, "queries": NUM_LABELS - 10, "of": "labels"}
