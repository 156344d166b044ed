"""Checkpoints: saving and restoring, the number that is kept, files that Orbax refuses."""

import dataclasses
import gc
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.models.definition import define_model
from vixml_jax.run.checkpoint import Checkpoint, Checkpointer
from vixml_jax.run.state import TrainState, abstract_state, model_part
from vixml_jax.training.optimizer import make_optimizer

NUM_QUERIES = 50


def abstract_on(mesh):
  """Returns the abstract state of a tiny run on a mesh."""
  encoder = dict(vocab_size=11, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, max_position=6, num_token_types=0)
  model = define_model(encoder, dict(num_heads=2, mlp_dim=4), num_free_vectors=4)
  optimizer = make_optimizer(
    model.shapes, learning_rate=1.0, new_learning_rate=1.0, free_vector_learning_rate=1.0, warmup_steps=1, total_steps=9
  )
  return abstract_state(model, optimizer, NUM_QUERIES, num_labels=20, bank_dtype="bfloat16", mesh=mesh)


@pytest.fixture(scope="module")
def abstract():
  """The abstract state, sharded over the three axes of eight devices."""
  return abstract_on(sharding.make_mesh(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def state(abstract):
  """A state with random values."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jax.device_put(rng.normal(0, 9, leaf.shape).astype(leaf.dtype), leaf.sharding), abstract
  )


def assert_same(found: TrainState | dict, wanted: TrainState | dict):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype and a.sharding == b.sharding, path
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def save(folder, state, *steps, clusters=None, keep=2):
  with Checkpointer(folder, keep) as checkpointer:
    for step in steps:
      checkpointer.save(step, Checkpoint(state, clusters, {"step": step, "config": {"a": [1, 2]}}))
  return folder


@pytest.mark.parametrize("clusters", [None, np.arange(NUM_QUERIES, dtype=np.int32)[::-1].copy()], ids=["none", "given"])
def test_a_checkpoint_is_restored_as_it_was_saved(tmp_path, abstract, state, clusters):
  save(tmp_path, state, 7, clusters=clusters)
  with Checkpointer(tmp_path, 2) as checkpointer:
    assert checkpointer.latest_step() == 7
    restored = checkpointer.restore(7, abstract, NUM_QUERIES)
    assert checkpointer.meta(7) == restored.meta == {"step": 7, "config": {"a": [1, 2]}}
  assert_same(restored.state, state)
  if clusters is None:
    assert restored.query_clusters is None
  else:
    np.testing.assert_array_equal(restored.query_clusters, clusters)
    assert restored.query_clusters.dtype == np.int32


def test_a_checkpoint_of_eight_devices_is_restored_on_one(tmp_path, state):
  save(tmp_path, state, 7)
  one = abstract_on(sharding.make_mesh(devices=jax.devices()[:1]))
  with Checkpointer(tmp_path, 2) as checkpointer:
    restored = checkpointer.restore(7, one, NUM_QUERIES).state
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {1}
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_the_newest_checkpoints_are_kept(tmp_path, state):
  save(tmp_path, state, 1, 2, 3, 4, keep=3)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_a_model_is_restored_without_its_optimizer(tmp_path, abstract, state):
  shutil.rmtree(save(tmp_path, state, 3) / "3" / "training")
  with Checkpointer(tmp_path, 2) as checkpointer:
    restored = checkpointer.restore_model(3, model_part(abstract))
  assert_same(restored, {"params": state.params, "centroids": state.centroids, "label_clusters": state.label_clusters})


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_arrays(item):
  for path in (path for path in item.rglob("d/*") if path.is_file()):
    _cut(path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons its other reads.
@pytest.mark.parametrize(
  "damage",
  [
    lambda step: shutil.rmtree(step / "training"),
    lambda step: _cut(step / "model" / "_METADATA"),
    lambda step: _cut_arrays(step / "model"),
    lambda step: (step / "model" / "manifest.ocdbt").unlink(),
    lambda step: _cut(step / "meta" / "metadata"),
  ],
  ids=["training", "metadata", "arrays", "manifest", "meta"],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, abstract, state, damage):
  damage(save(tmp_path, state, 3) / "3")
  with Checkpointer(tmp_path, 2) as checkpointer, pytest.raises(InputError, match="damaged") as error:
    checkpointer.restore(3, abstract, NUM_QUERIES)
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
  del error
  gc.collect()  # Ends most of the abandoned reads; for the others, pyproject.toml has an exception.


def test_a_checkpoint_of_another_model_is_refused(tmp_path, abstract, state):
  save(tmp_path, state, 3)
  other = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype, sharding=leaf.sharding), model_part(abstract)
  )
  with Checkpointer(tmp_path, 2) as checkpointer, pytest.raises(InputError, match="does not fit this config"):
    checkpointer.restore_model(3, other)


def test_a_checkpoint_with_an_array_that_the_config_lacks_is_refused(tmp_path, abstract, state):
  save(tmp_path, state, 3)
  params = {name: value for name, value in abstract.params.items() if name != "free_vectors"}
  with Checkpointer(tmp_path, 2) as checkpointer, pytest.raises(InputError, match="does not fit this config"):
    checkpointer.restore(3, dataclasses.replace(abstract, params=params), NUM_QUERIES)


def test_the_largest_arrays_are_read_first_and_one_at_a_time(tmp_path, abstract, state, monkeypatch):
  # Reading needs memory for a second copy, and every array that was read before is in memory as well.
  save(tmp_path, state, 3)
  sizes = []
  restore = ocp.Checkpointer.restore

  def recorded(checkpointer, path, args):
    restored = restore(checkpointer, path, args=args)
    sizes.append([leaf.nbytes for leaf in jax.tree.leaves(restored) if isinstance(leaf, jax.Array)])
    return restored

  monkeypatch.setattr(ocp.Checkpointer, "restore", recorded)
  with Checkpointer(tmp_path, 2) as checkpointer:
    checkpointer.restore(3, abstract, NUM_QUERIES)
  largest = sorted([state.bank.nbytes, state.centroids.nbytes], reverse=True)
  assert sizes[:2] == [[nbytes] for nbytes in largest]
  largest_of_parts = [max(part) for part in sizes if part]
  assert largest_of_parts == sorted(largest_of_parts, reverse=True)
  assert sum(map(len, sizes)) == len(jax.tree.leaves(state))
