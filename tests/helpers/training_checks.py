"""Shared by tests of training: the parts of a run, loss and gradients on a mesh, interrupted runs, two processes."""

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
from vixml_jax.input.batches import TrainingQueries, make_batch, steps_per_epoch
from vixml_jax.models.parameters import join_params
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import Checkpointer
from vixml_jax.run.setup import RunSetup, set_up_run
from vixml_jax.run.state import TrainState, abstract_state, create_state, init_params
from vixml_jax.training import loop
from vixml_jax.training.loop import training_queries
from vixml_jax.training.start import initial_checkpoint
from vixml_jax.training.step import StepConfig, batch_loss, device_batch, step_config


@dataclasses.dataclass(frozen=True)
class TrainingParts:
  """What `training.loop.train` builds before its first step."""

  setup: RunSetup
  queries: TrainingQueries
  total_steps: int
  step: StepConfig
  abstract: TrainState


def training_parts(config, workdir):
  """Returns the parts of a run that `workdir` belongs to."""
  setup = set_up_run(config, workdir, extract=True)
  queries = training_queries(setup.config, setup.data)
  total_steps = setup.config.train.epochs * steps_per_epoch(len(queries), setup.config.train.batch_size)
  step = step_config(setup.config, setup.model, setup.layout, total_steps, setup.data.num_labels)
  return TrainingParts(setup, queries, total_steps, step, abstract_on(setup, step, queries, setup.mesh))


def first_checkpoint(config, workdir):
  """Returns the checkpoint of step 0, and the encoder of the run."""
  parts = training_parts(config, workdir)
  setup, encoder = parts.setup, parts.setup.load_encoder()
  checkpoint = initial_checkpoint(
    setup.config,
    parts.abstract,
    parts.step.optimizer,
    parts.queries,
    encoder,
    setup.weights_folder,
    setup.data.fingerprint,
    has_steps=True,
  )
  return checkpoint, encoder


def abstract_on(setup, step, queries, mesh):
  """Returns the abstract state on a mesh."""
  sizes, has_classifiers = (len(queries), setup.data.num_labels), step.classifiers is not None
  return abstract_state(setup.model, step.optimizer, *sizes, "float32", mesh, has_classifiers=has_classifiers)


def one_batch(parts, size=16):
  """Returns the first batch of so many queries."""
  return make_batch(parts.queries, np.arange(len(parts.queries)), size, parts.setup.layout, seed=0, epoch=0, step=0)


def loss_and_gradients(parts, mesh, features=None, remat=True, size=16, chunks_in="encoder"):
  """Returns loss, query embeddings and gradients of a batch on the host, close to the initial parameters.

  At the initial parameters themselves, adapters are zero, and so are half of their gradients.
  """
  setup, model = parts.setup, parts.setup.model
  batch = one_batch(parts, size)
  abstract = abstract_on(setup, parts.step, parts.queries, mesh)
  params, frozen = model.split(init_params(model, mesh, 0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + jax.device_put(rng.normal(0, 0.02, x.shape).astype(x.dtype), x.sharding), params)
  state = create_state(abstract, params, parts.step.optimizer)
  step = dataclasses.replace(parts.step, remat=remat, chunks_in=chunks_in)
  loss_of = jax.jit(
    jax.value_and_grad(
      lambda params, frozen, state, batch: batch_loss(
        step, mesh, join_params(params, frozen), state, batch, step.base_key
      ),
      has_aux=True,
    )
  )
  (loss, (_, embeddings)), gradients = loss_of(params, frozen, state, device_batch(batch, features, mesh))
  return jax.device_get((loss, embeddings, gradients))


def assert_close(left, right):
  """Checks that two trees are equal up to rounding, since sums are taken in different orders."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def assert_same_bits(left, right):
  """Checks that two trees are equal."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def metrics_of(final):
  """Returns the metrics among the values of final_metrics.json, without times and settings."""
  return {name: value for name, value in final.items() if "@" in name}


def final_state(config, workdir):
  """Returns the state of a finished run, on the host."""
  parts = training_parts(config, workdir)
  with Checkpointer(workdir / "checkpoints", 2) as checkpointer:
    return jax.device_get(checkpointer.restore(parts.total_steps, parts.abstract, len(parts.queries)).state)


def assert_sigterm_changes_no_bit(config, undisturbed, workdir, monkeypatch):
  """Trains in `workdir` with a SIGTERM in the second epoch, continues, and compares with an undisturbed workdir."""
  send_sigterm_at_batch(5, monkeypatch)
  with pytest.raises(Preempted, match="saved step"):
    train_and_evaluate(config, workdir)
  monkeypatch.undo()
  train_and_evaluate(config, workdir)
  assert_same_bits(final_state(config, undisturbed), final_state(config, workdir))


def send_sigterm_at_batch(number, monkeypatch):
  """Sends SIGTERM to this process when training makes its batch of this number, counted from now on."""
  calls = iter(range(1000))

  def batch_then_sigterm(*args, **kwargs):
    if next(calls) == number:
      os.kill(os.getpid(), signal.SIGTERM)
    return make_batch(*args, **kwargs)

  monkeypatch.setattr(loop, "make_batch", batch_then_sigterm)


def _flag_value(value):
  """Returns a value as a flag takes it: numbers of a tuple between commas, texts as Python writes them."""
  is_numbers = isinstance(value, tuple) and not any(isinstance(each, str) for each in value)
  return ",".join(map(str, value)) if is_numbers else value


def command(config, workdir, devices=8, encoder="minilm-l6", module="vixml_jax.main"):
  """Returns the command line that trains `config`, which must come from configs/custom.py with this encoder.

  `module` may be followed by arguments that come before the flags.
  """
  given = configuration.flatten_config(config)
  flags = [
    f"--config.{key}={_flag_value(value)}"
    for key, value in given.items()
    if value != () and not key.startswith("baselines")
  ]
  flags_of_xla = os.environ["XLA_FLAGS"].replace("_device_count=8", f"_device_count={devices}")  # See conftest.
  environment = os.environ | {"XLA_FLAGS": flags_of_xla}
  arguments = [
    sys.executable,
    "-m",
    *module.split(),
    f"--config=configs/custom.py:encoder={encoder}",
    f"--workdir={workdir}",
    *flags,
  ]
  return dict(args=arguments, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_step(workdir):
  """Returns the step of the last line of metrics.jsonl; 0 if there is none, or if it is being written."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  try:
    return json.loads(lines[-1])["step"] if lines else 0
  except json.JSONDecodeError:
    return 0


def two_processes(config, workdir, devices=2, encoder="minilm-l6", module="vixml_jax.main"):
  """Starts a run in two processes with the given number of devices each; arguments as for `command`."""
  return joined_commands(config, workdir, 2, devices, encoder, module)


def joined_commands(config, workdir, count, devices=2, encoder="minilm-l6", module="vixml_jax.main"):
  """Starts a run in several processes with the given number of devices each; arguments as for `command`."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  commands = [command(config, workdir, devices, encoder, module) for _ in range(count)]
  for number, started in enumerate(commands):
    started["args"] += [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process={number}"]
  return [subprocess.Popen(**started) for started in commands]


def assert_two_processes_train_like_one(config, one, two, devices=2, encoder="minilm-l6"):
  """Trains in two processes, and compares with a workdir of one process of eight devices.

  Args:
    config: Config of the finished run.
    one: Workdir of the finished run.
    two: Workdir of the two processes.
    devices: Number of devices of each of them.
    encoder: Name of the encoder in the config.
  """
  processes = two_processes(config, two, devices, encoder)
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

  def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["values"]["loss"] for line in lines if line["split"] == "train"]

  # Sums are taken in different orders, and the differences grow from step to step.
  np.testing.assert_allclose(losses(one), losses(two), rtol=2e-3)
  alone, together = (final_state(config, workdir) for workdir in (one, two))
  np.testing.assert_allclose(alone.bank, together.bank, atol=5e-3)
  np.testing.assert_allclose(alone.centroids, together.centroids, atol=5e-3)
  np.testing.assert_array_equal(alone.label_clusters, together.label_clusters)
