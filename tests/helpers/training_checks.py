"""What tests of training share: loss and gradients on a mesh, runs that are stopped or in processes, equal states."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers.miniature_runs import ROOT
from vixml_jax.errors import Preempted
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.input.batches import make_batch
from vixml_jax.models import layers
from vixml_jax.run import configuration
from vixml_jax.run.from_config import set_up
from vixml_jax.run.state import abstract_state, create_state, init_params
from vixml_jax.training import loop
from vixml_jax.training.step import batch_loss, device_batch


def loss_and_gradients(run, mesh, bank=None):
  """Loss, query embeddings and gradients of a batch of 16 on the host, near initial parameters.

  At these themselves adapters begin with zeros, and half of their gradients are zero, too.
  """
  batch = make_batch(run.queries, np.arange(len(run.queries)), 16, run.layout, seed=0, epoch=0, step=1)
  abstract = abstract_state(run.model, run.optimizer, len(run.queries), run.corpus.num_labels, "float32", mesh)
  params, frozen = run.model.split(init_params(run.model, mesh, 0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + jax.device_put(rng.normal(0, 0.02, x.shape).astype(x.dtype), x.sharding), params)
  state = create_state(abstract, params, run.optimizer)
  loss_of = jax.jit(
    jax.value_and_grad(
      lambda params, frozen, state, batch: batch_loss(
        run.model, layers.join_params(params, frozen), state, batch, run.layout, run.loss, run.base_key, True, mesh
      ),
      has_aux=True,
    )
  )
  (loss, (_, embeddings)), gradients = loss_of(params, frozen, state, device_batch(batch, mesh, bank))
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


def assert_stopped_and_started_again_ends_with_the_same_bits(config, folder, monkeypatch):
  """Trains once undisturbed, and once with SIGTERM in between, in the folders `undisturbed` and `stopped`."""
  train_and_evaluate(config, folder / "undisturbed")
  send_sigterm_at_batch(5, monkeypatch)
  with pytest.raises(Preempted, match="saved step"):
    train_and_evaluate(config, folder / "stopped")
  monkeypatch.undo()
  train_and_evaluate(config, folder / "stopped")
  assert_same_bits(final_state(config, folder / "undisturbed"), final_state(config, folder / "stopped"))


def send_sigterm_at_batch(number, monkeypatch):
  """From now on training gets SIGTERM while it makes its batch of this number."""
  calls = iter(range(1000))

  def batch_then_sigterm(*args, **kwargs):
    if next(calls) == number:
      os.kill(os.getpid(), signal.SIGTERM)
    return make_batch(*args, **kwargs)

  monkeypatch.setattr(loop, "make_batch", batch_then_sigterm)


def command(config, workdir, devices=8, encoder="minilm-l6"):
  """The command line that trains `config`, which must come from configs/custom.py with that encoder."""
  given = configuration.flatten_config(config)
  flags = [
    f"--config.{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
    for key, value in given.items()
    if value != () and not key.startswith("baselines")
  ]
  environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  arguments = [
    sys.executable,
    "-m",
    "vixml_jax.main",
    f"--config=configs/custom.py:encoder={encoder}",
    f"--workdir={workdir}",
    *flags,
  ]
  return dict(args=arguments, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_step(workdir):
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def two_processes(config, workdir, devices=2, encoder="minilm-l6"):
  """Starts a run in two processes of so many devices each."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  commands = [command(config, workdir, devices, encoder) for _ in range(2)]
  for number, started in enumerate(commands):
    started["args"] += [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process={number}"]
  return [subprocess.Popen(**started) for started in commands]


def assert_two_processes_train_like_one(config, folder, devices=2, encoder="minilm-l6"):
  """Two epochs in two processes of so many devices each, and in one that has them all."""
  config.train.epochs = 2
  alone = subprocess.run(**command(config, folder / "one", 2 * devices, encoder))
  assert alone.returncode == 0, alone.stdout
  processes = two_processes(config, folder / "two", devices, encoder)
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

  def losses(name):
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [line["values"]["loss"] for line in lines if line["split"] == "train"]

  # Float tolerance grows over steps: sums are taken in another order.
  np.testing.assert_allclose(losses("one"), losses("two"), rtol=2e-3)
  config.mesh.update(dict(data=-1, fsdp=1, tensor=1))  # To read what they left on this process's devices.
  one, two = (dataclasses.asdict(final_state(config, folder / name)) for name in ("one", "two"))
  np.testing.assert_allclose(one["bank"], two["bank"], atol=5e-3)
  np.testing.assert_allclose(one["centroids"], two["centroids"], atol=5e-3)
  np.testing.assert_array_equal(one["label_clusters"], two["label_clusters"])
