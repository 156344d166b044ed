"""Search over int8 codes equals search in float32, with proof; search over bits finds nearly the same labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.search_cases import brute_force, integers, mesh_of_two, unit
from vixml_jax.errors import InputError
from vixml_jax.search import compact_index, vector_codes
from vixml_jax.search.compact_index import CompactIndex
from vixml_jax.search.prefixes import ScaledPrefixes

NUM_LABELS, DIM = 3_000, 36  # A dimension that does not fill its last byte of bits.


def clustered(rows, seed, spread=0.6):
  """Unit vectors around 40 centers, with one dimension that is large in all of them."""
  points = unit(40, 99, DIM)[np.random.default_rng(seed).integers(0, 40, rows)] + spread * unit(rows, seed, DIM)
  points[:, 3] += 1
  return points / np.linalg.norm(points, axis=1, keepdims=True)


def _direction(labels):
  return labels.mean(axis=0) / np.linalg.norm(labels.mean(axis=0))


def _index(labels, dtype, **changes):
  return CompactIndex(labels, dtype, mesh_of_two(), **dict(block=512, query_chunk=8) | changes)


@pytest.mark.parametrize("k", [1, 10])
def test_int8_returns_the_labels_and_scores_of_brute_force(k):
  labels, queries = clustered(NUM_LABELS, 0), 3 * clustered(19, 1)
  index = _index(labels, "int8")
  scores, ids = index.search(queries, k)
  expected_scores, expected_ids = brute_force(labels, queries, k)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
  assert index.num_unproven < 3


def test_with_int8_ties_go_to_the_lower_id_and_queries_without_proof_are_searched_in_float32():
  labels, queries = integers(NUM_LABELS, 0, 2), np.concatenate([integers(10, 1, 2), np.zeros((1, 2), np.float32)])
  index = _index(labels, "int8")
  scores, ids = index.search(queries, 10)
  expected_scores, expected_ids = brute_force(labels, queries, 10)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)
  assert 0 < index.num_unproven <= 10, "the query of zeros needs no search"


def test_labels_too_close_to_tell_apart_by_int8_are_searched_in_float32():
  labels = np.repeat(unit(5, 0, DIM), NUM_LABELS // 5, axis=0) + 1e-4 * unit(NUM_LABELS, 1, DIM)
  queries = unit(5, 2, DIM)
  index = _index(labels, "int8")
  np.testing.assert_array_equal(index.search(queries, 5)[1], brute_force(labels, queries, 5)[1])
  assert index.num_unproven == 5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("spread", [0.05, 0.6])
def test_the_int8_score_plus_the_slack_is_above_every_inner_product(scale, spread):
  labels, queries = scale * clustered(500, 0, spread), np.concatenate([unit(20, 1, DIM), clustered(20, 2, spread)])
  labels[0], labels[1, 1:] = 0, 0
  direction = _direction(labels)
  codes, extremes = vector_codes.encode("int8", jnp.asarray(labels), direction)
  encoded = vector_codes.encode_queries("int8", jnp.asarray(queries), direction, extremes)
  above = vector_codes.scores("int8", encoded, codes) + encoded.slack[:, None]
  exact = queries.astype(np.float64) @ labels.T.astype(np.float64)
  gap = np.asarray(above, np.float64) - exact
  assert (gap >= 0).all()
  assert np.median(gap) < 0.1 * np.abs(exact).max(), "the bound is of use"


def test_bits_are_signs_beside_the_mean_direction_and_their_score_is_that_of_the_restored_vectors():
  labels, queries = clustered(50, 0), unit(3, 1, DIM)
  direction = _direction(labels)
  codes, extremes = vector_codes.encode("bit", jnp.asarray(labels), direction)
  signs = np.unpackbits(np.asarray(codes.values), axis=1, bitorder="little")[:, :DIM] * 2.0 - 1
  rest = labels - np.outer(labels @ direction, direction)
  assert np.mean(signs == np.where(rest > 0, 1, -1)) > 0.999
  scales = np.square(rest).sum(1) / np.abs(rest).sum(1)
  np.testing.assert_allclose(codes.scales, scales, rtol=1e-4)
  encoded = vector_codes.encode_queries("bit", jnp.asarray(queries), direction, extremes)
  rest = queries - np.outer(queries @ direction, direction)
  largest = np.abs(rest).max(1, keepdims=True)
  wanted = np.outer(queries @ direction, labels @ direction)
  wanted += np.rint(rest / largest * 127) * largest / 127 @ (signs * scales[:, None]).T
  np.testing.assert_allclose(vector_codes.scores("bit", encoded, codes), wanted, atol=1e-2)


def test_int8_proves_the_labels_of_vectors_that_point_in_nearly_one_direction():
  labels, queries = (unit(1, 7, DIM) + 0.1 * clustered(rows, seed) for rows, seed in ((NUM_LABELS, 0), (20, 1)))
  index = _index(labels, "int8")
  np.testing.assert_array_equal(index.search(queries, 5)[1], brute_force(labels, queries, 5)[1])
  assert index.num_unproven == 0


def test_bits_find_nearly_all_labels_and_give_them_float32_scores():
  labels, queries = clustered(NUM_LABELS, 0), clustered(40, 1)
  scores, ids = _index(labels, "bit").search(queries, 10)
  _, expected = brute_force(labels, queries, 10)
  assert np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(ids, expected, strict=True)]) > 0.9
  np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, labels[ids]), rtol=1e-5)
  assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("dtype", ["int8", "bit"])
def test_fewer_labels_than_asked_for_leave_empty_places(dtype):
  labels, queries = unit(7, 0), unit(3, 1)
  scores, ids = _index(labels, dtype).search(queries, 9)
  expected_scores, expected_ids = brute_force(labels, queries, 9)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "bit"])
def test_only_the_rows_of_candidates_are_read_by_a_search(dtype, monkeypatch):
  labels, queries = clustered(NUM_LABELS, 0), clustered(8, 1)
  index = _index(ScaledPrefixes(labels, 20), dtype)
  read = []
  rows_of = ScaledPrefixes.__getitem__
  monkeypatch.setattr(
    ScaledPrefixes, "__getitem__", lambda self, rows: (read.append(len(rows)), rows_of(self, rows))[1]
  )
  index.search(queries[:, :20], 1)
  assert index.num_unproven == 0 and sum(read) <= 8 * compact_index._LEAST * 1.25


def test_the_codes_take_the_bytes_that_are_stated():
  labels = clustered(NUM_LABELS, 0)
  for dtype, size in (("int8", DIM + 8), ("bit", 5 + 8)):
    index = _index(labels, dtype)
    rows = len(index._codes.scales)
    assert sum(x.nbytes for x in index._codes) == rows * size == rows * vector_codes.bytes_per_label(dtype, DIM)


def test_an_index_without_labels_and_queries_of_another_width_are_refused():
  with pytest.raises(InputError, match="search needs at least 1"):
    _index(unit(4, 0), "int8", rows=np.zeros(0, np.int64))
  with pytest.raises(InputError, match="label embeddings have 8 columns"):
    _index(unit(4, 0), "int8").search(unit(2, 1, 6), 1)


def test_one_device_gives_what_two_give():
  labels, queries = clustered(NUM_LABELS, 0), clustered(9, 1)
  one = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
  found = [CompactIndex(labels, "bit", mesh, block=640).search(queries, 5) for mesh in (one, mesh_of_two())]
  jax.tree.map(np.testing.assert_array_equal, *found)
