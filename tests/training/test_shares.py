"""No device and no process holds more of the embeddings of all labels or queries than its share and a block."""

import json

import numpy as np
import pytest

from tests.helpers.miniature_runs import miniature_config
from tests.helpers.share_guard import ShareGuard, Violation
from tests.helpers.training_checks import two_processes
from vixml_jax import sharded_rows
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.row_files import RowFiles
from vixml_jax.sharding import make_mesh

DIM, SHARE = 32, 256
"""2,048 rows of labels and of training queries are 256 on each of 8 devices."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A run on more labels and queries than one block of the guard."""
  config = miniature_config(tmp_path_factory.mktemp("data"), num_train=1500, num_test=400, num_labels=1200)
  config.encoder.num_layers, config.train.epochs = 1, 1
  config.encoder.random_init = True
  config.train.update(dict(batch_size=512, chunk_rows=64))
  config.dataset.validation_fraction = 0.1
  config.eval.update(dict(retrieval_choose=True, every_epochs=1))
  return config


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
  """Workdir of one process of eight devices under the guard, and what the guard saw."""
  workdir = tmp_path_factory.mktemp("alone")
  with pytest.MonkeyPatch.context() as patch:
    guard = ShareGuard(DIM, SHARE)
    guard.install(patch.setattr)
    train_and_evaluate(config, workdir)
  return workdir, guard


def test_a_run_on_eight_devices_holds_shares_only(alone):
  workdir, guard = alone
  assert guard.copies >= 10 and guard.arrays > 50, "the guard saw the run"
  labels = RowFiles(workdir / "embeddings", "labels")
  assert labels.shape == (1200, DIM) and len(list((workdir / "embeddings").glob("labels-*"))) == 8
  np.testing.assert_array_equal(np.load(next((workdir / "index").glob("0*")) / "labels.npy"), labels.load())


@pytest.mark.slow
def test_two_processes_of_four_devices_hold_and_write_their_shares_and_agree_with_one(config, alone, tmp_path):
  processes = two_processes(config, tmp_path, 4, module=f"tests.helpers.share_guard {DIM} {SHARE}")
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
  one, two = (json.loads((workdir / "final_metrics.json").read_text()) for workdir in (alone[0], tmp_path))
  # The blend's trees are fitted on few queries: another rounding may change a split, and thereby many ranks.
  names = [name for name in one if "@" in name and not name.startswith("blend/")]
  assert [one[name] for name in names] == pytest.approx([two[name] for name in names], abs=2)
  for name in ("labels", "train_queries", "test_queries"):
    left, right = (RowFiles(workdir / "embeddings", name).load() for workdir in (alone[0], tmp_path))
    np.testing.assert_allclose(left, right, atol=0.02)


def test_the_guard_notices_a_whole_array_on_the_host_and_on_a_device(monkeypatch):
  guard = ShareGuard(DIM, SHARE)
  rows = sharded_rows.zeros(2000, DIM, make_mesh())
  guard.install(monkeypatch.setattr)
  with pytest.raises(Violation, match="is copied whole"):
    np.asarray(rows.values)
  whole = rows.block(0, 2048)
  with pytest.raises(Violation, match="a device holds 2048 of the rows"):
    guard.check_devices()
  del whole
