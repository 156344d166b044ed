"""Files of rows: each process writes its shares, and the shares are read back in order or refused."""

import numpy as np
import pytest

from tests.helpers.sharded import from_host
from vixml_jax import sharded_rows
from vixml_jax.errors import InputError
from vixml_jax.row_files import RowFiles, remove_shares, write_shares
from vixml_jax.sharding import make_mesh

MESHES = [(8, 1, 1), (2, 2, 2), (1, 1, 8)]


def _host(num_rows=1500, dim=12):
  return np.random.default_rng(0).normal(size=(num_rows, dim)).astype(np.float32)


def _written(folder, mesh=(2, 4, 1), host=None, name="labels"):
  """Writes rows that are split over eight devices, and returns them."""
  host = _host() if host is None else host
  rows = from_host(host, make_mesh(*mesh))
  write_shares(folder, name, host.shape[1], rows.own_shards(), rows.num_shards)
  return host


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_shares_are_read_back_in_order(tmp_path, mesh, monkeypatch):
  monkeypatch.setattr(sharded_rows, "BLOCK_ROWS", 100)
  host = _written(tmp_path, mesh)
  shares = mesh[0] * mesh[1]
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    f"labels-{number:05d}-of-{shares:05d}.npy" for number in range(shares)
  ]
  files = RowFiles(tmp_path, "labels")
  assert len(files) == 1500 and files.shape == (1500, 12)
  np.testing.assert_array_equal(files.load(), host)
  for size in (7, 64, 4096):
    blocks = list(files.blocks(size))
    assert max(map(len, blocks)) <= size
    np.testing.assert_array_equal(np.concatenate(blocks), host)


def test_each_share_is_an_array_that_numpy_reads(tmp_path):
  host = _written(tmp_path)
  first = np.load(tmp_path / "labels-00000-of-00008.npy")
  np.testing.assert_array_equal(first, host[: len(first)])
  assert first.dtype == np.float32


def test_a_share_that_holds_only_padding_is_an_empty_array(tmp_path):
  host = _written(tmp_path, host=_host(5))
  assert np.load(tmp_path / "labels-00007-of-00008.npy").shape == (0, 12)
  np.testing.assert_array_equal(RowFiles(tmp_path, "labels").load(), host)


def test_a_missing_share_is_named(tmp_path):
  _written(tmp_path)
  (tmp_path / "labels-00003-of-00008.npy").unlink()
  with pytest.raises(InputError, match=r"labels-00003-of-00008.npy: is missing"):
    RowFiles(tmp_path, "labels")
  (tmp_path / "labels-00007-of-00008.npy").unlink()
  with pytest.raises(InputError, match=r"labels-00003-of-00008.npy: is missing"):
    RowFiles(tmp_path, "labels")


def test_no_share_at_all_is_named(tmp_path):
  _written(tmp_path)
  with pytest.raises(InputError, match=r"contains no train_queries-"):
    RowFiles(tmp_path, "train_queries")


def test_shares_of_another_number_of_devices_are_refused_and_can_be_removed(tmp_path):
  _written(tmp_path, (2, 2, 2))
  host = _written(tmp_path, (8, 1, 1), host=_host() + 1)
  other = _written(tmp_path, (2, 2, 2), name="labels-of-another-kind")
  with pytest.raises(InputError, match="several runs"):
    RowFiles(tmp_path, "labels")
  (tmp_path / "labels.npy").touch()  # A file of an earlier version.
  remove_shares(tmp_path, "labels")
  assert {path.name.rsplit("-", 3)[0] for path in tmp_path.glob("labels*")} == {"labels-of-another-kind"}
  host = _written(tmp_path, (2, 2, 2))
  np.testing.assert_array_equal(RowFiles(tmp_path, "labels").load(), host)
  np.testing.assert_array_equal(RowFiles(tmp_path, "labels-of-another-kind").load(), other)


def test_a_file_that_is_cut_off_is_named(tmp_path):
  _written(tmp_path)
  path = tmp_path / "labels-00002-of-00008.npy"
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(InputError, match=r"labels-00002-of-00008.npy: is cut off"):
    list(RowFiles(tmp_path, "labels").blocks())


def test_a_file_that_is_no_array_is_named(tmp_path):
  _written(tmp_path)
  (tmp_path / "labels-00002-of-00008.npy").write_bytes(b"damaged")
  with pytest.raises(InputError, match=r"labels-00002-of-00008.npy: cannot be read"):
    RowFiles(tmp_path, "labels")


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
  host = _written(tmp_path, (1, 1, 8))

  def failing():
    yield host[:3]
    raise RuntimeError("stopped")

  with pytest.raises(RuntimeError, match="stopped"):
    write_shares(tmp_path, "labels", 12, [(0, 0, failing())], 1)
  np.testing.assert_array_equal(RowFiles(tmp_path, "labels").load(), host)
  assert [path.name for path in tmp_path.iterdir()] == ["labels-00000-of-00001.npy"]
