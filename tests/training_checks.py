"""What tests of training share: a batch's loss and gradients on a mesh, a run that is stopped, equal states."""

import os
import signal

import jax
import numpy as np

from vixml_jax.input.batches import make_batch
from vixml_jax.training import loop
from vixml_jax.training.setup import set_up
from vixml_jax.training.state import abstract_state, create_state, init_params
from vixml_jax.training.step import batch_loss, device_batch


def loss_and_gradients(run, mesh, bank=None):
  """Loss, query embeddings and gradients of a batch of 16 at initial parameters, on the host."""
  batch = make_batch(run.queries, np.arange(len(run.queries)), 16, run.layout, seed=0, epoch=0, step=1)
  abstract = abstract_state(run.model, run.optimizer, len(run.queries), run.corpus.num_labels, "float32", mesh)
  state = create_state(abstract, init_params(run.model, mesh, 0), run.optimizer)
  loss_of = jax.jit(jax.value_and_grad(
      lambda params, state, batch: batch_loss(
          run.model, params, state, batch, run.layout, run.loss, run.base_key, True, mesh), has_aux=True))
  (loss, (_, embeddings)), gradients = loss_of(state.params, state, device_batch(batch, mesh, bank))
  return jax.device_get((loss, embeddings, gradients))


def assert_close(left, right):
  """Equal but for the order of sums."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def assert_same_bits(left, right):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def final_state(config, workdir):
  """The state that a finished run left."""
  run = set_up(config, workdir)
  with loop.Checkpointer(workdir / "checkpoints", 2) as checkpointer:
    return jax.device_get(checkpointer.restore(run.total_steps, run.abstract, len(run.queries)).state)


def send_sigterm_at_batch(number, monkeypatch):
  """From now on training gets SIGTERM while it makes its batch of this number."""
  calls = iter(range(1000))

  def batch_then_sigterm(*args, **kwargs):
    if next(calls) == number:
      os.kill(os.getpid(), signal.SIGTERM)
    return make_batch(*args, **kwargs)

  monkeypatch.setattr(loop, "make_batch", batch_then_sigterm)
