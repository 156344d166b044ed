"""Sharded rows: reading, selecting and writing equal NumPy indexing, and no device holds more than its share."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.sharded import from_host
from vixml_jax import sharded_rows
from vixml_jax.sharding import make_mesh

MESHES = [(8, 1, 1), (2, 2, 2), (1, 1, 8)]


def _host(num_rows=3000, dim=12):
  return np.random.default_rng(0).normal(size=(num_rows, dim)).astype(np.float32)


@pytest.fixture(params=MESHES, ids=str)
def mesh(request):
  """Eight devices in three layouts."""
  return make_mesh(*request.param)


def test_rows_are_read_by_id_and_minus_one_gives_zeros(mesh):
  host = _host()
  rows = from_host(host, mesh)
  assert len(rows) == 3000 and rows.shape == (3000, 12)
  ids = np.array([5, 2999, -1, 0, 5])
  np.testing.assert_array_equal(rows.take(ids), np.where(ids[:, None] < 0, 0, host[ids]))
  np.testing.assert_array_equal(rows.block(2990, 16), np.pad(host[2990:], ((0, 6), (0, 0))))


@pytest.mark.parametrize("size", [7, 1000, 4096])
def test_blocks_are_all_rows_in_order(mesh, size):
  host = _host()
  blocks = list(from_host(host, mesh).blocks(size))
  assert [start for start, _ in blocks] == list(range(0, 3000, min(size, 3000)))
  np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), host)


def test_selected_rows_equal_indexing(mesh, monkeypatch):
  monkeypatch.setattr(sharded_rows, "BLOCK_ROWS", 512)
  host = _host()
  ids = np.random.default_rng(1).permutation(3000)[:1300]
  selected = from_host(host, mesh).select(ids)
  assert len(selected) == 1300
  np.testing.assert_array_equal(np.concatenate([block for _, block in selected.blocks()]), host[ids])


def test_rows_are_replaced_by_id_and_minus_one_is_ignored(mesh):
  host, new = _host(), _host(4) + 10
  rows = sharded_rows.put(from_host(host, mesh), np.array([2999, -1, 0, 17]), jnp.asarray(new))
  host[[2999, 0, 17]] = new[[0, 2, 3]]
  np.testing.assert_array_equal(np.concatenate([block for _, block in rows.blocks()]), host)


def test_the_shares_of_a_process_are_its_rows_without_padding(mesh, monkeypatch):
  monkeypatch.setattr(sharded_rows, "BLOCK_ROWS", 100)
  host = _host()
  rows = from_host(host, mesh)
  shares = {number: (first, list(blocks)) for number, first, blocks in rows.own_shards()}
  assert sorted(shares) == list(range(rows.num_shards))
  for first, blocks in shares.values():
    share = np.concatenate(blocks) if blocks else np.zeros((0, 12), np.float32)
    assert all(len(block) <= 100 for block in blocks)
    np.testing.assert_array_equal(share, host[first : first + len(share)])
  assert sum(len(block) for _, blocks in shares.values() for block in blocks) == 3000


def test_no_program_holds_all_rows_on_a_device():
  mesh, share = make_mesh(8, 1, 1), 32_768 // 8 * 12 * 4
  rows = sharded_rows.zeros(32_000, 12, mesh)
  assert {shard.data.nbytes for shard in rows.values.addressable_shards} == {share}
  ids, block = np.arange(64, dtype=np.int32), jnp.zeros((64, 12))
  for lowered in (
    sharded_rows.take_program.lower(rows.values, ids, mesh=mesh),
    sharded_rows.put_program.lower(rows.values, ids, block, mesh=mesh),
  ):
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < share / 4
