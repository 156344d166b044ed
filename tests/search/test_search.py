"""Exact search equals brute force on any number of devices; filtering keeps k; ScaNN behind the same interface."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.search import exact, scann_index
from vixml_jax.search.exact import ExactIndex, block_top_k
from vixml_jax.search.index import make_index, search_excluding
from vixml_jax.search.membership import is_in_row
from vixml_jax.search.scann_index import ScannIndex, choose_parameters, scann_available

needs_scann = pytest.mark.skipif(not scann_available()[0], reason=scann_available()[1])


def _mesh(shape=(1,), axes=("data",)):
  return Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), axes)


def _integers(rows, seed, dim=6):
  """Small whole numbers: inner products are exact in float32, and many of them are equal."""
  return np.random.default_rng(seed).integers(-2, 3, (rows, dim)).astype(np.float32)


def _brute_force(labels, queries, k):
  scores = queries.astype(np.float64) @ np.asarray(labels, np.float64).T
  ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  missing = ((0, 0), (0, k - ids.shape[1]))
  scores = np.take_along_axis(scores, ids, axis=1).astype(np.float32)
  return np.pad(scores, missing, constant_values=-np.inf), np.pad(ids, missing, constant_values=-1)


@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param(lambda: _mesh(), id="1 device"),
    pytest.param(lambda: None, id="all devices"),
    pytest.param(lambda: _mesh((2, 3), ("data", "fsdp")), id="2 x 3 devices"),
  ],
)
@pytest.mark.parametrize(
  ("num_labels", "block", "k"),
  [
    (1, 65_536, 1),  # fewer labels than devices
    (5, 65_536, 9),  # k > L
    (997, 65_536, 7),  # one block a device
    (997, 50, 7),  # several blocks, the last ones padded
    (997, 50, 120),  # k > block
  ],
)
def test_exact_search_equals_brute_force_with_ties_to_the_lower_id(mesh, num_labels, block, k):
  labels, queries = _integers(num_labels, 0), _integers(11, 1)
  index = ExactIndex(labels, mesh(), block=block, query_chunk=4)
  scores, ids = index.search(queries, k)
  expected_scores, expected_ids = _brute_force(labels, queries, k)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)
  assert scores.dtype == np.float32 and ids.dtype == np.int32


def test_exact_search_takes_sharded_arrays_and_bfloat16():
  mesh = _mesh((8,))
  labels, queries = _integers(64, 0), _integers(8, 1)
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  index = ExactIndex(jax.device_put(jnp.asarray(labels, jnp.bfloat16), sharding), mesh)
  scores, ids = index.search(jax.device_put(queries, sharding), 5)
  np.testing.assert_array_equal(ids, _brute_force(labels, queries, 5)[1])
  np.testing.assert_array_equal(scores, _brute_force(labels, queries, 5)[0])


def test_exact_search_compiles_once_for_all_chunks_and_indexes():
  programs = exact._program
  programs.cache_clear()
  for seed in (0, 1):
    index = ExactIndex(_integers(50, seed), _mesh(), query_chunk=4)
    for count in (1, 4, 10):
      index.search(_integers(count, 1), 3)
  assert programs.cache_info().misses == 1
  assert programs(_mesh(), 50, 3, False)._cache_size() == 1


def test_exact_search_of_no_queries_is_empty():
  scores, ids = ExactIndex(_integers(50, 0), _mesh()).search(_integers(0, 1), 3)
  assert scores.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(("width", "k"), [(1000, 3), (4099, 10), (4096, 1), (300, 300), (17, 2)])
def test_block_top_k_equals_top_k_of_the_whole_row(width, k):
  scores = jnp.asarray(np.random.default_rng(width).integers(0, 40, (5, width)), jnp.float32)
  for ours, expected in zip(block_top_k(scores, k), jax.lax.top_k(scores, k), strict=True):
    np.testing.assert_array_equal(ours, expected)


def test_wrong_shapes_are_named():
  with pytest.raises(InputError, match=r"\(3, 5\).*6 columns"):
    ExactIndex(_integers(4, 0), _mesh()).search(np.zeros((3, 5), np.float32), 1)
  with pytest.raises(InputError, match="L at least 1"):
    ExactIndex(np.zeros((0, 6), np.float32))
  with pytest.raises(InputError, match=r"'faiss'.*exact, scann"):
    make_index("faiss", _integers(4, 0))


def test_membership_equals_sets():
  rng = np.random.default_rng(0)
  rows = [rng.integers(0, 30, rng.integers(0, 6)).tolist() for _ in range(40)]
  ids = rng.integers(-1, 30, (40, 7))
  expected = [[i in row for i in found] for found, row in zip(ids.tolist(), rows, strict=True)]
  np.testing.assert_array_equal(is_in_row(ids, Ragged.from_rows(rows)), expected)


@pytest.mark.parametrize("k", [1, 4, 30])
def test_search_excluding_equals_brute_force_over_what_is_left(k):
  rng = np.random.default_rng(0)
  labels, queries = _integers(23, 0), _integers(30, 1)
  # The best labels of a query are the ones that hurt when they go.
  best = _brute_force(labels, queries, 23)[1]
  rows = [best[i, :n].tolist() for i, n in enumerate(rng.integers(0, 6, 30))]
  rows[7] = list(range(23))
  scores, ids = search_excluding(ExactIndex(labels, _mesh()), queries, k, Ragged.from_rows(rows), query_chunk=8)
  for query in range(30):
    left = [label for label in range(23) if label not in rows[query]]
    expected_scores, places = _brute_force(labels[left], queries[[query]], k)
    expected = [left[place] if place >= 0 else -1 for place in places[0]]
    assert ids[query].tolist() == expected
    np.testing.assert_array_equal(scores[query], expected_scores[0])


def test_search_excluding_nothing_is_search():
  labels, queries = _integers(23, 0), _integers(30, 1)
  index = ExactIndex(labels, _mesh())
  expected = index.search(queries, 4)
  empty = Ragged(np.zeros(0, np.int32), np.zeros(31, np.int64))
  for exclude in (None, empty):
    result = search_excluding(index, queries, 4, exclude, query_chunk=7)
    np.testing.assert_array_equal(result[0], expected[0])
    np.testing.assert_array_equal(result[1], expected[1])


def test_scann_asked_for_without_the_package_says_what_to_install(monkeypatch):
  monkeypatch.setattr(scann_index.importlib.util, "find_spec", lambda name: None)
  assert scann_available()[0] is False
  with pytest.raises(InputError, match=r"pip install vixml_jax\[scann\]") as error:
    make_index("scann", _integers(4, 0))
  assert "\n" not in str(error.value)


def test_scann_on_a_cpu_without_avx_is_refused_before_it_is_imported(monkeypatch):
  monkeypatch.setattr(scann_index.importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(scann_index, "_cpu_flags", lambda: frozenset({"sse4_2"}))
  with pytest.raises(InputError, match=r"CPU lacks AVX and FMA.*search=exact"):
    make_index("scann", _integers(4, 0))


def test_scann_parameters_follow_its_rules_of_thumb():
  small, middle, large = (choose_parameters(19_999), choose_parameters(20_000), choose_parameters(131_072))
  assert (small.leaves, small.reorder) == (0, 0)
  assert middle.leaves == 0 and middle.reorder >= 100
  assert large.leaves == 362 and 0 < large.leaves_to_search < 362 and large.dimensions_per_block == 2
  assert choose_parameters(1_305_265).bfloat16 and not large.bfloat16


@needs_scann
def test_scann_equals_brute_force_on_few_labels():
  rng = np.random.default_rng(0)
  labels, queries = (rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(9, 8)).astype(np.float32))
  scores, ids = make_index("scann", labels).search(queries, 60)
  expected_scores, expected_ids = _brute_force(labels, queries, 60)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


@needs_scann
@pytest.mark.parametrize("tree", [False, True])
def test_scann_recall_against_exact(tree):
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(100, 16))
  points = centers[rng.integers(0, 100, 4500)] + 0.3 * rng.normal(size=(4500, 16))
  points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
  labels, queries = points[:4000], points[4000:]
  parameters = choose_parameters(131_072 if tree else 50_000, k=10)
  if tree:
    parameters = scann_index.dataclasses.replace(parameters, leaves=64, leaves_to_search=16)
  _, ids = ScannIndex(labels, k=10, parameters=parameters).search(queries, 10)
  _, expected = ExactIndex(labels, _mesh()).search(queries, 10)
  assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(ids, expected, strict=True)]) > 0.95
  assert np.all(np.diff(np.sort(ids, axis=1), axis=1) > 0)  # SOAR keeps a label in two leaves: none comes twice


@needs_scann
def test_scann_excluding_equals_exact_excluding():
  labels, queries = (
    np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)[part] for part in (slice(0, 200), slice(200, 300))
  )
  exclude = Ragged.from_rows([[query % 200, (7 * query) % 200] for query in range(100)])
  expected = search_excluding(make_index("exact", labels, _mesh()), queries, 5, exclude)
  result = search_excluding(make_index("scann", labels), queries, 5, exclude)
  np.testing.assert_array_equal(result[1], expected[1])
