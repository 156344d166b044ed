"""The label index reads back what was written and searches by uid and category, with both kinds of search."""

import numpy as np
import pytest

from tests.helpers.search_cases import (
  DIM,
  NUM_LABELS,
  NUM_TRAIN,
  RETRIEVAL,
  both_kinds,
  brute_force,
  filters_and_mask,
  needs_scann,
  opened,
  unit,
  written,
)
from vixml_jax.errors import InputError
from vixml_jax.search import scann_index, snapshots
from vixml_jax.search.retrieval_augmented import Neighbors, combine, search_both

LABELS, TRAIN, QUERIES = unit(NUM_LABELS, 0), unit(NUM_TRAIN, 2), unit(5, 3)


@both_kinds
def test_what_is_written_is_read_back_after_the_folder_is_moved(tmp_path, search):
  written(tmp_path / "index", search).rename(tmp_path / "moved")
  index = opened(tmp_path / "moved")
  assert (index.num_labels, index.num_live, index.dim, index.search_kind) == (NUM_LABELS, NUM_LABELS, DIM, search)
  assert index.retrieval == RETRIEVAL
  assert index.texts([3, 3, 59]) == ["label 3 é ü", "label 3 é ü", "label 59 é ü"]
  assert index.uids(np.asarray([0, 41])) == ["u/0", "u/41"]
  assert index.ids_of(["u/41", "u/0"]).tolist() == [41, 0]
  np.testing.assert_array_equal(index.label_clusters, np.arange(NUM_LABELS) % 4)
  np.testing.assert_array_equal(index.cluster_means, unit(4, 1))
  scores, ids = index.search(QUERIES, 6)
  expected_scores, expected_ids = brute_force(LABELS, QUERIES, 6)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
  np.testing.assert_array_equal(index.query_index.search(QUERIES, 6)[1], brute_force(TRAIN, QUERIES, 6)[1])


@needs_scann
@pytest.mark.parametrize(("written_for", "search"), [("exact", "scann"), ("scann", "exact")])
def test_either_search_works_with_an_index_that_was_written_for_the_other(tmp_path, written_for, search):
  index = opened(written(tmp_path / "index", written_for), search=search)
  assert index.search_kind == search
  np.testing.assert_array_equal(index.search(QUERIES, 6)[1], brute_force(LABELS, QUERIES, 6)[1])


def test_scann_without_the_package_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setattr(scann_index.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install 'vixml-jax\[scann\]'"):
    written(tmp_path / "index", "scann")
  assert not (tmp_path / "index" / "CURRENT").exists()
  with pytest.raises(InputError, match=r"pip install 'vixml-jax\[scann\]'"):
    opened(written(tmp_path / "index"), search="scann")


def test_an_index_remembers_the_pointer_of_its_snapshot(tmp_path):
  folder = tmp_path / "index"
  assert snapshots.read_pointer(folder) == ""
  index = opened(written(folder))
  assert index.current == snapshots.read_pointer(folder) != ""
  edited = index.delete([1])
  assert index.current != snapshots.read_pointer(folder) == edited.current
  (folder / "CURRENT").write_bytes(b"\xff")
  assert snapshots.read_pointer(folder) == ""


@pytest.mark.parametrize(("uid", "message"), [("u/99", "'u/99' is not in"), ("", "'' is not in"), ("u/5", "deleted")])
def test_unknown_and_deleted_uids_are_named(tmp_path, uid, message):
  index = opened(written(tmp_path / "index")).delete([5])
  with pytest.raises(InputError, match=message):
    index.ids_of(["u/1", uid])


@both_kinds
def test_filters_by_uid_and_category_equal_brute_force(tmp_path, search):
  index = opened(written(tmp_path / "index", search)).delete([4, 6])
  filters, mask = filters_and_mask(index)
  _, ids = index.search(QUERIES, 5, filters)
  np.testing.assert_array_equal(ids, brute_force(LABELS, QUERIES, 5, mask)[1])


def test_empty_filters_are_plain_search(tmp_path):
  index = opened(written(tmp_path / "index"))
  filters = index.filters(allow=[None] * 5, deny=[[], None, (), None, None], categories=[None] * 5)
  assert filters.allow is None and filters.deny is None
  np.testing.assert_array_equal(index.search(QUERIES, 6, filters)[1], index.search(QUERIES, 6)[1])


def test_queries_of_one_category_share_its_set(tmp_path):
  filters = opened(written(tmp_path / "index")).filters(categories=[["even"], None, ["even"], ["odd"]])
  assert len(filters.allow.sets) == 2 and filters.allow.set_of_query.tolist() == [0, -1, 0, 1]


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (dict(allow=[["u/1"], ["u/77"]]), "'u/77' is not in"),
    (dict(deny=[["nobody"]]), "'nobody' is not in"),
    (dict(categories=[["blue"]]), "'blue' is not in .*which has 3: even, odd, third"),
  ],
)
def test_unknown_names_in_filters_are_named(tmp_path, names, message):
  with pytest.raises(InputError, match=message):
    opened(written(tmp_path / "index")).filters(**names)


def test_retrieval_augmentation_from_the_index_equals_that_from_arrays(tmp_path):
  index = opened(written(tmp_path / "index"))
  neighbors = search_both(index.label_index, index.query_index, QUERIES, label_hits=10, query_hits=10)
  _, ids = combine(neighbors, index.query_labels, num_labels=NUM_LABELS, lambda_=0.5, temperature=0.1, k=6)
  has_label = np.zeros((NUM_TRAIN, NUM_LABELS))
  for row in range(NUM_TRAIN):
    has_label[row, [row % NUM_LABELS, (7 * row + 1) % NUM_LABELS]] = 1
  for query in range(5):
    cosines = [QUERIES[query] @ part.T for part in (LABELS, TRAIN)]
    mass = np.exp(np.concatenate([np.where(c >= np.sort(c)[-10], c, -np.inf) for c in cosines]) / 0.1)
    expected = 0.5 * mass[:NUM_LABELS] + 0.5 * mass[NUM_LABELS:] @ has_label
    assert ids[query].tolist() == np.argsort(-expected, kind="stable")[:6].tolist()


def test_deleted_and_filtered_labels_get_no_mass_from_training_queries(tmp_path):
  index = opened(written(tmp_path / "index")).delete(range(10))
  assert index.query_labels.values.min() == 10 and len(index.query_labels) == NUM_TRAIN
  filters = index.filters(allow=[None, None, ["u/11", "u/12"], [], None], deny=[None, ["u/20"], None, None, None])
  neighbors = Neighbors(*index.search(QUERIES, 20, filters), *index.query_index.search(QUERIES, 20))
  _, ids = combine(
    neighbors, index.query_labels, num_labels=NUM_LABELS, lambda_=0.5, temperature=0.1, k=30, filters=filters
  )
  assert np.all((ids < 0) | (ids >= 10)) and 20 not in ids[1] and 20 in ids
  assert sorted(ids[2].tolist())[-3:] == [-1, 11, 12] and np.all(ids[3] == -1)


@pytest.mark.parametrize("name", ["query_index", "query_labels"])
def test_an_index_without_training_queries_says_how_to_write_one_with_them(tmp_path, name):
  index = opened(written(tmp_path / "index", queries=None, query_labels=None))
  with pytest.raises(InputError, match=r"without the training queries.*--retrieval_augmented"):
    getattr(index, name)
