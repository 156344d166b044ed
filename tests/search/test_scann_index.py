"""ScaNN behind the common interface: its recall, its parameters, and labels that are added and deleted."""

import dataclasses
import io
from pathlib import Path
import platform

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from tests.helpers.search_cases import TREE, brute_force, integers, needs_scann, normal, unit
from vixml_jax.errors import InputError
from vixml_jax.search import scann_index
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.index import make_index
from vixml_jax.search.membership import overlap
from vixml_jax.search.scann_index import ScannIndex, choose_parameters, scann_available


def _only(num_labels, live):
  return np.isin(np.arange(num_labels), sorted(live))


def test_scann_without_the_package_says_what_to_install(monkeypatch):
  monkeypatch.setattr(scann_index.importlib.util, "find_spec", lambda name: None)
  assert scann_available()[0] is False
  with pytest.raises(InputError, match=r"pip install 'vixml-jax\[scann\]'") as error:
    make_index("scann", integers(4, 0))
  assert "\n" not in str(error.value)


def test_scann_on_a_cpu_without_avx_is_refused_before_it_is_imported(monkeypatch):
  monkeypatch.setattr(scann_index.importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(platform, "machine", lambda: "x86_64")
  monkeypatch.setattr(Path, "open", lambda *_, **__: io.StringIO("processor: 0\nflags\t: fpu sse4_2\n"))
  available, reason = scann_available()
  assert not available and "CPU lacks AVX and FMA" in reason and "search=exact" in reason


def test_parameters_follow_the_rules_of_thumb_of_scann():
  small, middle, large = (choose_parameters(19_999), choose_parameters(20_000), choose_parameters(131_072))
  assert (small.leaves, small.reorder) == (0, 0)
  assert middle.leaves == 0 and middle.reorder >= 100
  assert large.leaves == 362 and 0 < large.leaves_to_search < 362 and large.dimensions_per_block == 2
  assert choose_parameters(1_305_265).bfloat16 and not large.bfloat16


@needs_scann
def test_scann_equals_brute_force_on_few_labels():
  labels, queries = normal(50, 0, 8), normal(9, 1, 8)
  scores, ids = make_index("scann", labels).search(queries, 60)
  expected_scores, expected_ids = brute_force(labels, queries, 60)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


@needs_scann
@pytest.mark.parametrize("tree", [False, True])
def test_scann_finds_most_of_what_exact_search_finds(tree):
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(100, 16))
  points = centers[rng.integers(0, 100, 4500)] + 0.3 * rng.normal(size=(4500, 16))
  points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
  labels, queries = points[:4000], points[4000:]
  parameters = choose_parameters(131_072 if tree else 50_000, k=10)
  if tree:
    parameters = dataclasses.replace(parameters, leaves=64, leaves_to_search=16)
  _, ids = ScannIndex(labels, k=10, parameters=parameters).search(queries, 10)
  _, expected = ExactIndex(labels, Mesh(np.asarray(jax.devices()[:1]), ("data",))).search(queries, 10)
  assert overlap(ids, expected) > 0.95
  assert np.all(np.diff(np.sort(ids, axis=1), axis=1) > 0), "SOAR has labels in two leaves; none may be found twice"


@needs_scann
@pytest.mark.parametrize(
  "parameters",
  [
    pytest.param(TREE, id="tree with SOAR"),
    pytest.param(dataclasses.replace(TREE, soar=False, bfloat16=True), id="tree, bfloat16"),
    pytest.param(dataclasses.replace(TREE, leaves=0, leaves_to_search=0, soar=False), id="no tree"),
  ],
)
def test_labels_are_added_and_deleted_and_read_back(tmp_path, parameters):
  labels, queries = unit(700, 0), unit(30, 1)
  index = ScannIndex(labels[:600], k=10, parameters=parameters)
  live = set(range(600))
  rng = np.random.default_rng(2)
  for step in range(3):
    new, gone = np.arange(600 + 30 * step, 630 + 30 * step), rng.choice(sorted(live), 40, replace=False)
    index.add(labels[new], new)
    index.delete(gone)
    index.delete(gone)  # They are no longer in the index.
    live = (live | set(new.tolist())) - set(gone.tolist())
    (tmp_path / str(step)).mkdir()
    index.save(tmp_path / str(step))
    index = ScannIndex.load(tmp_path / str(step))
    assert index.num_labels == len(live) and index.parameters == parameters
    _, ids = index.search(queries, 10)
    assert set(ids.ravel().tolist()) <= live
    assert overlap(ids, brute_force(labels, queries, 10, _only(700, live))[1]) > 0.9
  assert index.needs_rebuild
  _, everything = index.search(queries[:2], 700)
  assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() >= 0.9 * len(live) for row in everything)


@needs_scann
def test_when_the_best_labels_of_a_query_are_deleted_from_a_soar_tree_the_next_are_found():
  labels, queries = unit(600, 0), unit(5, 1)
  index = ScannIndex(labels, k=5, parameters=dataclasses.replace(TREE, reorder=600))
  best = brute_force(labels, queries, 200)[1]
  for query in range(5):
    index.delete(best[query])
  live = set(range(600)) - set(best.ravel().tolist())
  np.testing.assert_array_equal(index.search(queries, 5)[1], brute_force(labels, queries, 5, _only(600, live))[1])


@needs_scann
def test_a_pickle_among_the_files_of_scann_is_refused(tmp_path):
  ScannIndex(unit(50, 0)).save(tmp_path)
  (tmp_path / "scann_docids.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
  with pytest.raises(InputError, match="scann_docids.pkl.*unpickle"):
    ScannIndex.load(tmp_path)


@needs_scann
def test_files_that_do_not_fit_each_other_are_refused(tmp_path):
  ScannIndex(unit(50, 0)).save(tmp_path)
  np.save(tmp_path / "slots.npy", np.arange(49, dtype=np.int32))
  with pytest.raises(InputError, match="ScaNN has 50 labels but slots.npy has 49"):
    ScannIndex.load(tmp_path)
