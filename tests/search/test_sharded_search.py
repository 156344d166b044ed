"""Search of sharded rows where they are: equal to brute force on any mesh, without a copy of the labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.search_cases import brute_force, unit
from tests.helpers.sharded import from_host
from vixml_jax import sharding
from vixml_jax.ragged import Ragged
from vixml_jax.search.exact import ExactIndex, block_size, search_program
from vixml_jax.search.index import make_index, search_excluding
from vixml_jax.sharding import make_mesh, named_sharding

NUM_LABELS, NUM_QUERIES = 2100, 13


@pytest.fixture(scope="module", params=[(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def mesh(request):
  """Eight devices in three layouts."""
  return make_mesh(*request.param)


@pytest.fixture(scope="module")
def labels():
  """Unit vectors, some of them twice."""
  vectors = unit(NUM_LABELS, 0)
  vectors[700:760] = vectors[:60]
  return vectors


@pytest.fixture(scope="module")
def queries():
  """Unit vectors, of which the first are labels that exist twice."""
  return np.concatenate([unit(NUM_LABELS, 0)[:4], unit(NUM_QUERIES - 4, 1)])


@pytest.mark.parametrize("block", [65_536, 100])
def test_sharded_rows_give_the_results_of_brute_force(labels, queries, mesh, block):
  index = ExactIndex(from_host(labels, mesh), block=block)
  scores, ids = index.search(queries, 20)
  expected_scores, expected_ids = brute_force(labels, queries, 20)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
  np.testing.assert_array_equal(ids[:, :2], expected_ids[:, :2])
  assert [set(row) for row in ids] == [set(row) for row in expected_ids]


@pytest.mark.parametrize("block", [65_536, 100])
def test_rows_that_are_not_allowed_are_never_found_also_together_with_masks(labels, queries, mesh, block):
  allowed = np.random.default_rng(3).random(NUM_LABELS) < 0.5
  index = ExactIndex(from_host(labels, mesh), allowed=allowed, block=block)
  _, ids = index.search(queries, 20)
  _, expected = brute_force(labels, queries, 20, np.broadcast_to(allowed, (NUM_QUERIES, NUM_LABELS)))
  assert [set(row) for row in ids] == [set(row) for row in expected]
  masks = np.random.default_rng(4).random((3, NUM_LABELS)) < 0.5
  mask_of_query = np.arange(NUM_QUERIES) % 3
  _, ids = index.search(queries, 20, masks, mask_of_query)
  _, expected = brute_force(labels, queries, 20, (masks & allowed)[mask_of_query])
  assert [set(row) for row in ids] == [set(row) for row in expected]


def test_a_query_that_may_find_few_rows_gets_empty_places(labels, queries, mesh):
  allowed = np.zeros(NUM_LABELS, bool)
  allowed[[5, 2099]] = True
  scores, ids = make_index("exact", from_host(labels, mesh), allowed=allowed).search(queries, 4)
  assert np.all(ids[:, 2:] == -1) and np.all(scores[:, 2:] == -np.inf)
  assert all(set(row) == {5, 2099} for row in ids[:, :2])


@pytest.mark.parametrize("query_chunk", [4, 4096])
def test_sharded_queries_are_searched_block_by_block(labels, queries, mesh, query_chunk):
  index = ExactIndex(from_host(labels, mesh))
  exclude = Ragged.from_rows([[query, query + 700][: query % 3] for query in range(NUM_QUERIES)])
  placed = from_host(queries, mesh)
  for given in (None, exclude):
    expected = search_excluding(index, queries, 9, given)
    result = search_excluding(index, placed, 9, given, query_chunk=query_chunk)
    np.testing.assert_array_equal(result[1], expected[1])
    np.testing.assert_array_equal(result[0], expected[0])


def test_the_labels_are_not_copied(labels, mesh):
  rows = from_host(labels, mesh)
  before = {id(array) for array in jax.live_arrays()}
  index = ExactIndex(rows, allowed=np.ones(NUM_LABELS, bool))
  index.search(unit(8, 1), 5)
  new = [array for array in jax.live_arrays() if id(array) not in before and array.dtype == np.float32]
  assert not [array.shape for array in new if len(array) >= 1000]


def test_a_device_needs_no_more_than_blocks_besides_its_share():
  mesh, num_labels, dim, k = make_mesh(8, 1, 1), 1_310_720, 64, 100
  block = block_size(num_labels // 8, 4096)
  labels = jax.ShapeDtypeStruct((num_labels, dim), jnp.float32, sharding=named_sharding(mesh, "label", "vector"))
  queries = jax.ShapeDtypeStruct((8, dim), jnp.float32, sharding=named_sharding(mesh))
  program = search_program(mesh, sharding.row_axes(), num_labels, k, block, False)
  memory = program.lower(labels, queries).compile().memory_analysis()
  share = num_labels // 8 * dim * 4
  assert memory.argument_size_in_bytes == share + 8 * dim * 4
  assert memory.temp_size_in_bytes < 4 * block * max(dim, 8) * 4 < share / 4
