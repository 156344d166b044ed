"""The label index on disk: it reads back what was written, names damage, takes and drops labels, survives a kill."""

import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.search import label_index, scann_index, snapshots
from vixml_jax.search.label_index import IndexContents, LabelIndex, is_edited, write_index
from vixml_jax.search.retrieval_augmented import Neighbors, combine, search_both
from vixml_jax.search.scann_index import ScannIndex, ScannParameters, scann_available
from vixml_jax.search.text_table import TextTable

CHECKPOINT = {"step": 7, "sha256": "ab" * 32}
OTHER = {"step": 9, "sha256": "cd" * 32}
NUM_LABELS, NUM_TRAIN, DIM = 60, 40, 8
TREE = ScannParameters(leaves=8, leaves_to_search=8, reorder=50, dimensions_per_block=2, soar=True, bfloat16=False)

needs_scann = pytest.mark.skipif(not scann_available()[0], reason=scann_available()[1])
kinds = pytest.mark.parametrize("search", ["exact", pytest.param("scann", marks=needs_scann)])


def _unit(rows, seed):
  points = np.random.default_rng(seed).normal(size=(rows, DIM))
  return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def _mesh():
  return Mesh(np.asarray(jax.devices()[:2]), ("data",))


def _contents(num_labels=NUM_LABELS, **changes):
  ids = range(num_labels)
  return IndexContents(
    **dict(
      embeddings=_unit(num_labels, 0),
      texts=[f"label {i} é ü" for i in ids],
      uids=[f"u/{i}" for i in ids],
      label_clusters=np.arange(num_labels, dtype=np.int32) % 4,
      cluster_means=_unit(4, 1),
      queries=_unit(NUM_TRAIN, 2),
      query_labels=Ragged.from_rows([[i % num_labels, (7 * i + 1) % num_labels] for i in range(NUM_TRAIN)]),
      categories=[["even" if i % 2 == 0 else "odd", *(["third"] if i % 3 == 0 else [])] for i in ids],
    )
    | changes
  )


def _write(folder, search="exact", **changes):
  write_index(
    folder,
    _contents(**changes),
    checkpoint=CHECKPOINT,
    search=search,
    mesh=_mesh(),
    retrieval={"lambda": 0.9, "temperature": 0.05, "hits": 10},
  )
  return folder


def _open(folder, **changes):
  return LabelIndex.open(folder, **dict(checkpoint=CHECKPOINT, mesh=_mesh()) | changes)


def _best(embeddings, ids, queries, k):
  return np.asarray(ids)[np.argsort(-(queries @ embeddings[ids].T), axis=1, kind="stable")[:, :k]]


def _files(folder):
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@kinds
def test_what_is_written_is_read_back_wherever_the_folder_is_moved(tmp_path, search):
  _write(tmp_path / "index", search).rename(tmp_path / "moved")
  index, queries = _open(tmp_path / "moved"), _unit(5, 3)
  assert (index.num_labels, index.num_live, index.dim, index.search_kind) == (NUM_LABELS, NUM_LABELS, DIM, search)
  assert index.retrieval == {"lambda": 0.9, "temperature": 0.05, "hits": 10}
  assert index.texts([3, 3, 59]) == ["label 3 é ü", "label 3 é ü", "label 59 é ü"]
  assert index.uids(np.asarray([0, 41])) == ["u/0", "u/41"]
  assert index.ids_of(["u/41", "u/0"]).tolist() == [41, 0]
  np.testing.assert_array_equal(index.label_clusters, np.arange(NUM_LABELS) % 4)
  np.testing.assert_array_equal(index.cluster_means, _unit(4, 1))
  scores, ids = index.search(queries, 6)
  np.testing.assert_array_equal(ids, _best(_unit(NUM_LABELS, 0), range(NUM_LABELS), queries, 6))
  np.testing.assert_allclose(scores, np.sort(queries @ _unit(NUM_LABELS, 0).T)[:, ::-1][:, :6], rtol=1e-5)
  np.testing.assert_array_equal(
    index.query_index.search(queries, 4)[1], _best(_unit(NUM_TRAIN, 2), range(NUM_TRAIN), queries, 4)
  )


@needs_scann
def test_recall_of_scann_is_measured_logged_and_stored(tmp_path, caplog):
  with caplog.at_level("INFO"):
    index = _open(_write(tmp_path / "index", "scann"))
  assert index.info["recall"] == {"recall@10": 100, "recall@100": 100, "queries": NUM_TRAIN, "of": "training queries"}
  assert index.info["search"]["parameters"]["reorder"] == 0
  assert f"100.00 % (recall@10) and 100.00 % (recall@100) of what exact search finds, for {NUM_TRAIN}" in caplog.text


@needs_scann
def test_either_search_may_be_asked_for_whatever_the_index_was_written_for(tmp_path):
  for written, asked in (("exact", "scann"), ("scann", "exact")):
    index = _open(_write(tmp_path / written, written), search=asked)
    assert index.search_kind == asked
    queries = _unit(5, 3)
    np.testing.assert_array_equal(
      index.search(queries, 6)[1], _best(_unit(NUM_LABELS, 0), range(NUM_LABELS), queries, 6)
    )


def test_scann_asked_for_without_the_package_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setattr(scann_index.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install vixml_jax\[scann\]"):
    _write(tmp_path / "index", "scann")
  assert not (tmp_path / "index" / "CURRENT").exists()
  with pytest.raises(InputError, match=r"pip install vixml_jax\[scann\]"):
    _open(_write(tmp_path / "index"), search="scann")


def test_two_labels_of_one_uid_are_refused(tmp_path):
  with pytest.raises(InputError, match="'twice' stands for two labels"):
    _write(tmp_path / "index", uids=["twice", *(f"u/{i}" for i in range(NUM_LABELS - 2)), "twice"])


# Damage.


def _damage(folder, how):
  """Does one thing to an index and returns what the message must name."""
  snapshot = folder / "000001"
  labels, index = snapshot / "labels.npy", snapshot / "index.json"
  content = bytearray(labels.read_bytes())
  if how == "truncated":
    labels.write_bytes(content[:-5])
  elif how == "flipped byte":
    content[-9] ^= 1
    labels.write_bytes(content)
  elif how == "missing file":
    labels.unlink()
  elif how == "missing CURRENT":
    (folder / "CURRENT").unlink()
    return "CURRENT"
  elif how == "empty CURRENT":
    (folder / "CURRENT").write_text("")
    return "CURRENT"
  elif how == "missing index.json":
    index.unlink()
    return "index.json"
  elif how == "changed index.json":
    index.write_text(index.read_text().replace("0.9", "0.8"))
    return "index.json"
  return "labels.npy"


@pytest.mark.parametrize(
  "how",
  [
    "truncated",
    "flipped byte",
    "missing file",
    "missing CURRENT",
    "empty CURRENT",
    "missing index.json",
    "changed index.json",
  ],
)
def test_damage_is_named_with_what_to_do(tmp_path, how):
  folder = _write(tmp_path / "run" / "index")
  name = _damage(folder, how)
  with pytest.raises(InputError, match=name) as error:
    _open(folder)
  assert f"python -m vixml_jax.evaluate --workdir={tmp_path / 'run'}" in str(error.value)
  assert "\n" not in str(error.value)


def test_the_quick_check_compares_sizes_only(tmp_path):
  folder = _write(tmp_path / "index")
  _damage(folder, "flipped byte")
  _open(folder, verify=False)
  _damage(folder, "truncated")
  with pytest.raises(InputError, match=r"labels.npy: is damaged \(has 2,043 bytes instead of 2,048\)"):
    _open(folder, verify=False)


def test_an_index_of_another_checkpoint_is_refused_unless_none_is_named(tmp_path):
  folder = _write(tmp_path / "index")
  with pytest.raises(InputError, match=r"another checkpoint \(step 7, sha256 abababababab\).*\(step 9, sha256 cdcdcd"):
    _open(folder, checkpoint=OTHER)
  assert _open(folder, checkpoint=None).num_labels == NUM_LABELS


def test_an_index_of_another_format_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(label_index, "FORMAT", 99)
  folder = _write(tmp_path / "index")
  monkeypatch.undo()
  with pytest.raises(InputError, match=r"format 99, but this version reads format 1; delete .*index and run"):
    _open(folder)


def test_a_header_that_numpy_cannot_read_is_named_by_the_quick_check_too(tmp_path):
  folder = _write(tmp_path / "index")
  path = folder / "000001" / "labels.npy"
  path.write_bytes(path.read_bytes().replace(b"descr", b"descR"))
  with pytest.raises(InputError, match=r"000001: cannot be read .*python -m vixml_jax.evaluate"):
    _open(folder, verify=False)


@needs_scann
def test_a_pickle_among_scann_s_files_is_refused(tmp_path):
  folder = _write(tmp_path / "index", "scann")
  (folder / "000001" / "scann" / "scann_docids.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
  with pytest.raises(InputError, match="unpickled"):
    _open(folder)


# Names.


@pytest.mark.parametrize(("uid", "message"), [("u/99", "'u/99' is not in"), ("", "'' is not in"), ("u/5", "deleted")])
def test_unknown_and_deleted_uids_are_named(tmp_path, uid, message):
  index = _open(_write(tmp_path / "index")).delete([5])
  with pytest.raises(InputError, match=message):
    index.ids_of(["u/1", uid])


def test_texts_are_found_by_their_text_among_equal_hashes(monkeypatch):
  texts = ["", "a", "ü", "ab", "ba", "a", "a" * 300]
  assert TextTable.of(texts).find(["ba", "a", "ü", "", "x", "a" * 300]).tolist() == [4, 5, 2, 0, -1, 6]
  assert TextTable.of(texts).repeated() == "a"
  # All hashes alike: the texts themselves decide.
  monkeypatch.setattr("vixml_jax.search.text_table._hashes", lambda rows: np.zeros(len(rows), np.uint64))
  assert TextTable.of(texts).find(["ba", "a", "x"]).tolist() == [4, 5, -1]
  assert TextTable.of(texts).repeated() == "a" and TextTable.of(texts[:5]).repeated() is None


def test_rows_that_are_none_are_refused():
  with pytest.raises(IndexError, match="0 to 1, not -1 to 0"):
    TextTable.of(["a", "b"]).take([0, -1])


# Filters by name.


@kinds
def test_filters_by_uid_and_category_equal_brute_force(tmp_path, search):
  index, queries = _open(_write(tmp_path / "index", search)).delete([4, 6]), _unit(5, 3)
  given = index.filters(
    allow=[None, ["u/3", "u/4", "u/9"], None, [], ["u/2", "u/3", "u/8", "u/9"]],
    deny=[("u/0", "u/4"), None, ["u/1"], None, ["u/9"]],
    categories=[None, None, ["third"], None, ["even", "third"]],
  )
  _, ids = index.search(queries, 5, given)
  live = set(range(NUM_LABELS)) - {4, 6}
  may_have = [live - {0}, {3, 9}, {i for i in live if i % 3 == 0}, set(), {2, 3, 8}]
  for query, allowed in enumerate(may_have):
    expected = _best(_unit(NUM_LABELS, 0), sorted(allowed), queries[[query]], 5)[0].tolist() if allowed else []
    assert ids[query].tolist() == expected + [-1] * (5 - len(expected))


def test_filters_that_say_nothing_are_plain_search(tmp_path):
  index, queries = _open(_write(tmp_path / "index")), _unit(3, 3)
  given = index.filters(allow=[None] * 3, deny=[[], None, ()], categories=[None] * 3)
  assert given.allow is None and given.deny is None
  np.testing.assert_array_equal(index.search(queries, 4, given)[1], index.search(queries, 4)[1])


def test_queries_of_one_category_share_its_set(tmp_path):
  given = _open(_write(tmp_path / "index")).filters(categories=[["even"], None, ["even"], ["odd"]])
  assert len(given.allow.sets) == 2 and given.allow.of_query.tolist() == [0, -1, 0, 1]


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(allow=[["u/1"], ["u/77"]]), "'u/77' is not in"),
    (dict(deny=[["nobody"]]), "'nobody' is not in"),
    (dict(categories=[["blue"]]), "'blue' is not in .*which has 3: even, odd, third"),
  ],
)
def test_unknown_names_in_filters_are_named(tmp_path, given, message):
  with pytest.raises(InputError, match=message):
    _open(_write(tmp_path / "index")).filters(**given)


# Retrieval augmentation.


def test_retrieval_augmentation_from_the_index_equals_that_from_arrays(tmp_path):
  index, queries = _open(_write(tmp_path / "index")), _unit(5, 3)
  setting = dict(num_labels=NUM_LABELS, lambda_=0.5, temperature=0.1, k=6)
  neighbors = search_both(index.label_index, index.query_index, queries, label_hits=10, query_hits=10)
  _, ids = combine(neighbors, index.query_labels, **setting)
  labels, train = _unit(NUM_LABELS, 0), _unit(NUM_TRAIN, 2)
  has = np.zeros((NUM_TRAIN, NUM_LABELS))
  for row in range(NUM_TRAIN):
    has[row, [row % NUM_LABELS, (7 * row + 1) % NUM_LABELS]] = 1
  for query in range(5):
    cosines = [queries[query] @ part.T for part in (labels, train)]
    mass = np.exp(np.concatenate([np.where(c >= np.sort(c)[-10], c, -np.inf) for c in cosines]) / 0.1)
    expected = 0.5 * mass[:NUM_LABELS] + 0.5 * mass[NUM_LABELS:] @ has
    assert ids[query].tolist() == np.argsort(-expected, kind="stable")[:6].tolist()


def test_deleted_and_filtered_labels_get_no_share_from_training_queries(tmp_path):
  index, queries = _open(_write(tmp_path / "index")).delete(range(10)), _unit(5, 3)
  assert index.query_labels.values.min() == 10 and len(index.query_labels) == NUM_TRAIN
  given = index.filters(allow=[None, None, ["u/11", "u/12"], [], None], deny=[None, ["u/20"], None, None, None])
  neighbors = Neighbors(*index.search(queries, 20, given), *index.query_index.search(queries, 20))
  _, ids = combine(
    neighbors, index.query_labels, num_labels=NUM_LABELS, lambda_=0.5, temperature=0.1, k=30, filters=given
  )
  assert np.all((ids < 0) | (ids >= 10)) and 20 not in ids[1] and 20 in ids
  assert sorted(ids[2].tolist())[-3:] == [-1, 11, 12] and np.all(ids[3] == -1)


def test_an_index_without_training_queries_says_so(tmp_path):
  index = _open(_write(tmp_path / "index", queries=None, query_labels=None))
  for name in ("query_index", "query_labels"):
    with pytest.raises(InputError, match="without the training queries"):
      getattr(index, name)


# Labels come and go.


@kinds
def test_added_and_deleted_labels_are_searched_as_in_an_index_built_anew(tmp_path, search):
  index, queries = _open(_write(tmp_path / "index", search)), _unit(9, 3)
  all_labels = _unit(NUM_LABELS + 8, 5)
  all_labels[:NUM_LABELS] = _unit(NUM_LABELS, 0)
  names = [f"new {i}" for i in range(8)]
  edited = index.add(all_labels[NUM_LABELS:], names, names, np.arange(8), categories=[["even"]] * 7 + [["brand new"]])
  edited = edited.delete([0, 1, NUM_LABELS + 2])
  edited = edited.add(all_labels[:1], ["back"], ["u/0"], [3])
  live = [*range(2, NUM_LABELS + 2), *range(NUM_LABELS + 3, NUM_LABELS + 9)]
  table = np.concatenate([all_labels, all_labels[:1]])
  scores, ids = edited.search(queries, 12)
  np.testing.assert_array_equal(ids, _best(table, live, queries, 12))
  np.testing.assert_allclose(scores, np.take_along_axis(queries @ table.T, ids, axis=1), rtol=1e-4, atol=1e-6)
  fresh = LabelIndex.open(
    _write(
      tmp_path / "fresh", search, num_labels=len(table), embeddings=table, deleted=~np.isin(np.arange(len(table)), live)
    ),
    checkpoint=None,
    mesh=_mesh(),
  )
  np.testing.assert_array_equal(fresh.search(queries, 12)[1], ids)
  # What stands beside the embeddings moved along, and the former handle is as it was.
  assert (edited.num_labels, edited.num_live, edited.info["edits"]) == (NUM_LABELS + 9, len(live), 3)
  assert edited.ids_of(["new 3", "u/0"]).tolist() == [NUM_LABELS + 3, NUM_LABELS + 8]
  assert edited.texts([2, NUM_LABELS, NUM_LABELS + 8]) == ["label 2 é ü", "new 0", "back"]
  assert edited.label_clusters[[5, NUM_LABELS + 7, NUM_LABELS + 8]].tolist() == [1, 7, 3]
  category = edited.filters(categories=[["even"], ["brand new"]])
  assert {NUM_LABELS, 2} < set(category.allow.sets[0].tolist()) and category.allow.sets[1].tolist() == [NUM_LABELS + 7]
  np.testing.assert_array_equal(index.search(queries, 5)[1], _best(all_labels, range(NUM_LABELS), queries, 5))
  np.testing.assert_array_equal(
    edited.query_index.search(queries, 4)[1], _best(_unit(NUM_TRAIN, 2), range(NUM_TRAIN), queries, 4)
  )


@kinds
def test_queries_of_new_labels_join_the_training_queries_and_labels_are_replaced_in_one_step(tmp_path, search):
  index = _open(_write(tmp_path / "index", search))
  new, queries = _unit(2, 11), _unit(3, 12)
  edited = index.add(
    new,
    ["new", "again"],
    ["new", "u/7"],
    [1, 2],
    queries=queries,
    query_labels=Ragged.from_rows([[0], [0, 1], [1]]),
    delete=[7],
  )
  assert edited.info["edits"] == 1 and edited.ids_of(["u/7"]).tolist() == [NUM_LABELS + 1]
  found = edited.query_index.search(queries, 1)[1][:, 0]
  assert found.tolist() == [NUM_TRAIN, NUM_TRAIN + 1, NUM_TRAIN + 2]
  assert [edited.query_labels[row].tolist() for row in found] == [
    [NUM_LABELS],
    [NUM_LABELS, NUM_LABELS + 1],
    [NUM_LABELS + 1],
  ]
  assert not np.isin(7, edited.search(queries, NUM_LABELS)[1])
  LabelIndex.open(tmp_path / "index", checkpoint=None, mesh=_mesh(), verify=True)


def test_an_index_without_training_queries_leaves_those_of_new_labels_out(tmp_path):
  index = _open(_write(tmp_path / "index", queries=None, query_labels=None))
  edited = index.add(_unit(1, 11), ["new"], ["new"], [1], queries=_unit(1, 12), query_labels=Ragged.from_rows([[0]]))
  assert "queries.npy" not in edited.info["files"] and edited.num_live == NUM_LABELS + 1


@pytest.mark.parametrize("search", ["exact", "scann"])
@pytest.mark.parametrize("before", [None, [["old"]] * NUM_LABELS])
def test_categories_of_labels_are_replaced(tmp_path, search, before):
  index = _open(_write(tmp_path / "index", search=search, categories=before))
  found = index.search(_unit(3, 9), 5)
  edited = index.categorize([4, 2], [["new", "other"], []])
  assert {name: edited._labels_of_categories[name].tolist() for name in edited.categories} == {
    "new": [4],
    "other": [4],
  } | ({"old": [i for i in range(NUM_LABELS) if i not in (2, 4)]} if before else {})
  for one, other in zip(found, edited.search(_unit(3, 9), 5), strict=True):
    np.testing.assert_array_equal(one, other)
  assert edited.filters(categories=[["new"]]).allow.sets[0].tolist() == [4]
  with pytest.raises(InputError, match=f"there is no label {NUM_LABELS}"):
    edited.categorize([NUM_LABELS], [["new"]])


def test_old_snapshots_go_and_files_that_stay_are_linked(tmp_path):
  index = _open(_write(tmp_path / "index"))
  before = (tmp_path / "index" / "000001" / "queries.npy").stat().st_ino
  index.delete([1]).delete([2])
  assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [".lock", "000003", "CURRENT"]
  assert (tmp_path / "index" / "000003" / "queries.npy").stat().st_ino == before
  _open(tmp_path / "index")  # Every checksum is right.


def test_a_second_process_adds_to_what_the_first_one_wrote(tmp_path):
  first = _open(_write(tmp_path / "index"))
  second = _open(tmp_path / "index")
  first.add(_unit(1, 8), ["a"], ["a"], [0])
  both = second.add(_unit(1, 9), ["b"], ["b"], [0])
  assert both.ids_of(["a", "b"]).tolist() == [NUM_LABELS, NUM_LABELS + 1]


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda index: index.add(_unit(2, 8), ["a", "b"], ["a", "u/7"], [0, 0]), "'u/7' is in .* already; delete it first"),
    (lambda index: index.add(_unit(2, 8), ["a", "b"], ["a", "a"], [0, 0]), "'a' stands for two new labels"),
    (lambda index: index.delete([3, NUM_LABELS]), f"no label {NUM_LABELS}; ids go from 0 to {NUM_LABELS - 1}"),
    (lambda index: index.delete([-1]), "no label -1"),
    (lambda index: index.delete(range(NUM_LABELS)), "no label would be left"),
  ],
)
def test_edits_that_cannot_be_are_refused_and_change_nothing(tmp_path, edit, message):
  index = _open(_write(tmp_path / "index"))
  before = _files(tmp_path / "index")
  with pytest.raises(InputError, match=message):
    edit(index)
  assert _files(tmp_path / "index") == before
  assert not is_edited(tmp_path / "index", CHECKPOINT)


def test_an_edited_index_is_known_as_such_for_its_checkpoint(tmp_path):
  assert not is_edited(tmp_path / "index", CHECKPOINT)
  _open(_write(tmp_path / "index")).delete([1])
  assert is_edited(tmp_path / "index", CHECKPOINT) and not is_edited(tmp_path / "index", OTHER)
  _write(tmp_path / "index")
  assert not is_edited(tmp_path / "index", CHECKPOINT)


# Kills.


def _stop_at(monkeypatch, where):
  """Makes writing fail at one place."""

  def fail(*_, **__):
    raise KeyboardInterrupt(where)

  owner, name = {
    "while files are written": (snapshots, "_describe"),
    "before the rename": (Path, "rename"),
    "before CURRENT": (snapshots, "new_file"),
    "while CURRENT is replaced": (Path, "replace"),
  }[where]
  monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
  "where", ["while files are written", "before the rename", "before CURRENT", "while CURRENT is replaced"]
)
def test_an_interruption_leaves_the_former_index_and_the_next_edit_works(tmp_path, monkeypatch, where):
  index = _open(_write(tmp_path / "index"))
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    _stop_at(patched, where)
    index.delete([1])
  assert _open(tmp_path / "index").num_live == NUM_LABELS
  assert index.delete([2]).num_live == NUM_LABELS - 1
  assert len([path for path in (tmp_path / "index").iterdir() if path.is_dir()]) == 1


def test_a_killed_process_leaves_the_former_index(tmp_path):
  folder = _write(tmp_path / "index")
  code = textwrap.dedent("""
      import os, signal, sys
      from vixml_jax.search import snapshots, label_index
      snapshots.new_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)
      label_index.LabelIndex.open(sys.argv[1], checkpoint=None).delete([1])
      """)
  environment = os.environ | {"PYTHONPATH": str(Path(label_index.__file__).parents[2])}
  done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert (folder / "000002").is_dir()
  assert _open(folder).num_live == NUM_LABELS
  assert _open(folder).delete([2]).num_live == NUM_LABELS - 1
  assert json.loads((folder / "000003" / "index.json").read_text())["num_deleted"] == 1


def test_a_snapshot_that_is_replaced_while_it_is_opened_is_opened_anew(tmp_path, monkeypatch):
  folder = _write(tmp_path / "index")
  check = snapshots.check_files

  def replaced(snapshot, *arguments, **options):
    if snapshot.name == "000001":
      monkeypatch.setattr(snapshots, "check_files", check)
      _write(tmp_path / "other", num_labels=50)
      shutil.rmtree(folder)
      shutil.copytree(tmp_path / "other", folder)
      (folder / "000001").rename(folder / "000002")
      (folder / "CURRENT").write_text((folder / "CURRENT").read_text().replace("000001", "000002"))
    return check(snapshot, *arguments, **options)

  monkeypatch.setattr(snapshots, "check_files", replaced)
  assert _open(folder).num_labels == 50


# ScaNN that changes.


@needs_scann
@pytest.mark.parametrize(
  "parameters",
  [
    pytest.param(TREE, id="tree with SOAR"),
    pytest.param(scann_index.dataclasses.replace(TREE, soar=False, bfloat16=True), id="tree, bfloat16"),
    pytest.param(scann_index.dataclasses.replace(TREE, leaves=0, leaves_to_search=0, soar=False), id="no tree"),
  ],
)
def test_scann_adds_and_deletes_and_is_read_back(tmp_path, parameters):
  labels, queries = _unit(700, 0), _unit(30, 1)
  index = ScannIndex(labels[:600], k=10, parameters=parameters)
  live = set(range(600))
  rng = np.random.default_rng(2)
  for step in range(3):
    new, gone = np.arange(600 + 30 * step, 630 + 30 * step), rng.choice(sorted(live), 40, replace=False)
    index.add(labels[new], new)
    index.delete(gone)
    index.delete(gone)  # It no longer holds them.
    live = (live | set(new.tolist())) - set(gone.tolist())
    (tmp_path / str(step)).mkdir()
    index.save(tmp_path / str(step))
    index = ScannIndex.load(tmp_path / str(step))
    assert index.num_labels == len(live) and index.parameters == parameters
    _, ids = index.search(queries, 10)
    wanted = _best(labels, sorted(live), queries, 10)
    assert set(ids.ravel().tolist()) <= live
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(ids, wanted, strict=True)]) > 0.9
  assert index.needs_rebuild
  _, everything = index.search(queries[:2], 700)
  assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() >= 0.9 * len(live) for row in everything)


@needs_scann
def test_deleting_the_best_labels_of_a_query_from_a_soar_tree_leaves_the_next(monkeypatch):
  labels, queries = _unit(600, 0), _unit(5, 1)
  index = ScannIndex(labels, k=5, parameters=scann_index.dataclasses.replace(TREE, reorder=600))
  expected = _best(labels, range(600), queries, 205)
  for query in range(5):
    index.delete(expected[query, :200])
  live = sorted(set(range(600)) - set(expected[:, :200].ravel().tolist()))
  np.testing.assert_array_equal(index.search(queries, 5)[1], _best(labels, live, queries, 5))


@needs_scann
def test_scann_is_built_anew_when_over_a_tenth_has_changed(tmp_path, monkeypatch):
  built = []
  build = scann_index._build
  monkeypatch.setattr(scann_index, "_build", lambda *arguments: (built.append(len(arguments[0])), build(*arguments))[1])
  index = _open(_write(tmp_path / "index", "scann", queries=None, query_labels=None))
  index = index.delete(range(5))
  assert built == [NUM_LABELS]
  index = index.add(_unit(3, 8), list("abc"), list("abc"), [0, 0, 0])
  assert built == [NUM_LABELS, NUM_LABELS - 5 + 3]
  np.testing.assert_array_equal(index.search(_unit(3, 8), 1)[1].ravel(), np.arange(NUM_LABELS, NUM_LABELS + 3))
