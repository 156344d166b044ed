"""Exact search with a first pass in bfloat16 returns what it returns without one, and its bound holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.search_cases import brute_force, integers, mesh_of_two, unit
from vixml_jax.search import exact
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.first_pass import first_pass_pays, rounded_labels, score_bound

NUM_LABELS, DIM = 5_000, 32


@pytest.fixture
def with_first_pass(monkeypatch):
  """Lets small indexes have a first pass on any CPU; returns the numbers of queries that are searched in float32."""
  monkeypatch.setattr(exact, "first_pass_pays", lambda mesh: True)
  monkeypatch.setattr(exact, "_FIRST_PASS_FROM", 800)
  searched = []
  run = ExactIndex._run

  def count(index, program, labels, queries, *masks):
    if len(labels) == 1:
      searched.append(len(queries))
    return run(index, program, labels, queries, *masks)

  monkeypatch.setattr(ExactIndex, "_run", count)
  return searched


def _index(labels):
  return ExactIndex(labels, mesh_of_two(), block=1_024, query_chunk=8)


def test_ties_go_to_the_lower_id_and_queries_with_many_of_them_are_searched_in_float32(with_first_pass):
  labels, queries = integers(NUM_LABELS, 0), np.concatenate([integers(10, 1), np.zeros((1, 6), np.float32)])
  scores, ids = _index(labels).search(queries, 10)
  expected_scores, expected_ids = brute_force(labels, queries, 10)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)
  assert len(with_first_pass) == 1 and 0 < with_first_pass[0] <= 11


@pytest.mark.parametrize("k", [1, 10, 20])
def test_results_equal_those_of_a_search_in_float32(with_first_pass, monkeypatch, k):
  labels, queries = unit(NUM_LABELS, 0, DIM), 3 * unit(19, 1, DIM)
  index = _index(labels)
  found = index.search(queries, k)
  assert sum(with_first_pass) < 3, "the first pass proves nearly all of these queries"
  monkeypatch.setattr(index, "_has_first_pass", False)
  wanted = index.search(queries, k)
  np.testing.assert_array_equal(found[1], wanted[1])
  if first_pass_pays(mesh_of_two()):
    np.testing.assert_array_equal(found[0], wanted[0])
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)


def test_labels_too_close_to_tell_apart_are_searched_in_float32(with_first_pass):
  labels = unit(1, 0, DIM) + 1e-3 * unit(NUM_LABELS, 1, DIM)
  queries = np.concatenate([unit(1, 0, DIM), unit(9, 2, DIM)])
  found = _index(labels).search(queries, 5)
  assert with_first_pass == [10]
  np.testing.assert_array_equal(found[1], brute_force(labels, queries, 5)[1])


def test_masks_few_labels_and_few_queries_are_searched_without_a_first_pass(with_first_pass):
  labels, queries = integers(NUM_LABELS, 0), integers(8, 1)
  mask = np.arange(NUM_LABELS) % 2 == 0
  found = _index(labels).search(queries, 5, mask[None], np.zeros(8, np.int32))
  np.testing.assert_array_equal(found[1], brute_force(labels, queries, 5, mask[None])[1])
  _index(labels[:900]).search(queries, 5)
  _index(labels).search(queries[:7], 5)
  assert with_first_pass == [8, 8, 7]


def test_the_bound_holds_and_is_tight_where_all_values_are_rounded_in_the_same_direction():
  labels = jnp.concatenate([jnp.full((1, 64), 1 + 0.0039), 2 * jnp.asarray(unit(500, 0, 64))])
  queries = jnp.concatenate([jnp.ones((1, 64)), jnp.asarray(unit(7, 1, 64))])
  rounded = rounded_labels(labels)
  bound = score_bound(queries, rounded.norm, rounded.error)
  approximate = jnp.einsum(
    "qd,ld->ql", queries.astype(jnp.bfloat16), rounded.values, preferred_element_type=jnp.float32
  )
  differences = jnp.abs(approximate - jnp.einsum("qd,ld->ql", queries, labels, precision=jax.lax.Precision.HIGHEST))
  assert jnp.all(differences <= bound[:, None])
  assert differences[0, 0] > 0.95 * bound[0]
