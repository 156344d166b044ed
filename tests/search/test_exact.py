"""Exact search equals brute force on any number of devices, with few compilations."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import pytest

from tests.helpers.compilations import counted_compilations
from tests.helpers.search_cases import brute_force, integers
from vixml_jax.errors import InputError
from vixml_jax.search import exact
from vixml_jax.search.exact import ExactIndex, block_top_k
from vixml_jax.search.prefixes import release_rows


def _mesh(shape=(1,), axes=("data",)):
  return Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), axes)


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
    pytest.param(1, 65_536, 1, id="fewer labels than devices"),
    pytest.param(5, 65_536, 9, id="k above the number of labels"),
    pytest.param(997, 65_536, 7, id="one block"),
    pytest.param(997, 50, 120, id="several padded blocks, k above their size"),
  ],
)
def test_exact_search_equals_brute_force_with_ties_to_the_lower_id(mesh, num_labels, block, k):
  labels, queries = integers(num_labels, 0), integers(11, 1)
  index = ExactIndex(labels, mesh(), block=block, query_chunk=4)
  scores, ids = index.search(queries, k)
  expected_scores, expected_ids = brute_force(labels, queries, k)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)
  assert scores.dtype == np.float32 and ids.dtype == np.int32


def test_exact_search_accepts_sharded_arrays_and_bfloat16():
  mesh = _mesh((8,))
  labels, queries = integers(64, 0), integers(8, 1)
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  index = ExactIndex(jax.device_put(jnp.asarray(labels, jnp.bfloat16), sharding), mesh)
  scores, ids = index.search(jax.device_put(queries, sharding), 5)
  np.testing.assert_array_equal(ids, brute_force(labels, queries, 5)[1])
  np.testing.assert_array_equal(scores, brute_force(labels, queries, 5)[0])


@pytest.mark.parametrize("rows", [None, np.flatnonzero(np.arange(997) % 3)], ids=["all", "some"])
def test_a_memory_mapped_file_is_placed_block_by_block_and_its_pages_are_freed(tmp_path, monkeypatch, rows):
  monkeypatch.setattr(exact, "_ROWS_PER_COPY", 40)
  labels, queries = integers(997, 0), integers(11, 1)
  np.save(tmp_path / "labels.npy", labels)
  mapped = np.load(tmp_path / "labels.npy", mmap_mode="r")
  freed = []
  monkeypatch.setattr(exact, "release_rows", lambda array: freed.append(array) or release_rows(array))
  found = ExactIndex(mapped, rows=rows).search(queries, 7)
  wanted = ExactIndex(jnp.asarray(labels if rows is None else labels[rows])).search(queries, 7)
  np.testing.assert_array_equal(found[0], wanted[0])
  np.testing.assert_array_equal(found[1], wanted[1] if rows is None else rows[wanted[1]])
  assert len(freed) > len(jax.devices()) and all(array is mapped for array in freed)


def test_chunks_and_indexes_of_equal_shape_share_one_program():
  ExactIndex(integers(50, 0), _mesh(), query_chunk=4).search(integers(4, 1), 3)
  with counted_compilations() as compiled:
    index = ExactIndex(integers(50, 1), _mesh(), query_chunk=4)
    for count in (1, 4, 10):
      index.search(integers(count, 1), 3)
  assert not compiled


def test_search_of_no_queries_is_empty():
  scores, ids = ExactIndex(integers(50, 0), _mesh()).search(integers(0, 1), 3)
  assert scores.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(("width", "k"), [(1000, 3), (4099, 10), (300, 300), (17, 2)])
def test_block_top_k_equals_top_k_of_the_whole_row(width, k):
  scores = jnp.asarray(np.random.default_rng(width).integers(0, 40, (5, width)), jnp.float32)
  for actual, expected in zip(block_top_k(scores, k), jax.lax.top_k(scores, k), strict=True):
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
  ("start", "stop"), [(0, 4099), (1, 4098), (70, 100), (500, 501), (600, 600), (-5, 9000), (50, -3)]
)
@pytest.mark.parametrize(("width", "k"), [(4099, 10), (300, 300), (17, 2)])
def test_block_top_k_finds_positions_of_a_range_only(width, k, start, stop):
  scores = np.random.default_rng(width).integers(0, 40, (5, width)).astype(np.float32)
  inside = (np.arange(width) >= start) & (np.arange(width) < stop)
  expected, places = jax.lax.top_k(np.where(inside, scores, -np.inf), k)
  values, positions = jax.jit(block_top_k, static_argnums=1)(scores, k, start, stop)
  np.testing.assert_array_equal(values, expected)
  np.testing.assert_array_equal(np.where(values == -np.inf, -1, positions), np.where(expected == -np.inf, -1, places))


def test_wrong_shapes_are_named():
  with pytest.raises(InputError, match=r"\(3, 5\).*6 columns"):
    ExactIndex(integers(4, 0), _mesh()).search(np.zeros((3, 5), np.float32), 1)
  with pytest.raises(InputError, match="L at least 1"):
    ExactIndex(np.zeros((0, 6), np.float32))
