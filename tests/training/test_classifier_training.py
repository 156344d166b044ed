"""Training with classifiers of labels: what a step does on any mesh, and runs that are interrupted."""

import json

import jax
import numpy as np
import pytest

from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import (
  abstract_on,
  assert_close,
  assert_sigterm_changes_no_bit,
  final_state,
  one_batch,
  training_parts,
)
from vixml_jax import sharding
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.run.state import create_state, init_params
from vixml_jax.training.step import device_batch, make_train_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Config and workdir of a finished run of two epochs of four steps."""
  folder = tmp_path_factory.mktemp("classifiers")
  config = miniature_config(folder)
  config.train.update(dict(epochs=2, classifier_weight=0.5, warmup_steps=0))
  config.eval.update(dict(retrieval_augmented=False, blend=False, bootstrap_samples=0))
  train_and_evaluate(config, folder / "run")
  return config, folder / "run"


def test_a_batch_lists_all_positives_of_its_queries(finished):
  parts = training_parts(*finished)
  batch = one_batch(parts)
  for query, found in zip(batch.query_ids[batch.valid], batch.positive_ids[batch.valid], strict=True):
    assert [*found[found >= 0]] == [*parts.queries.labels[query]]
  assert (batch.positive_ids[~batch.valid] == -1).all()


def _stepped(parts, mesh):
  """State and metrics after one step of a new state on a mesh."""
  setup = parts.setup
  abstract = abstract_on(setup, parts.step, parts.queries, mesh)
  params = setup.model.split(init_params(setup.model, mesh, 0))[0]
  state = create_state(abstract, params, parts.step.optimizer)
  step = make_train_step(parts.step, abstract, mesh)
  return jax.device_get(step(state, {}, device_batch(one_batch(parts), None, mesh)))


def test_a_step_moves_encoder_and_classifiers_alike_on_every_mesh(finished):
  parts = training_parts(*finished)
  one, metrics = _stepped(parts, sharding.make_mesh(devices=jax.devices()[:1]))
  assert metrics["loss"] > metrics["classifier_loss"] * 0.5 > 0
  eight, _ = _stepped(parts, sharding.make_mesh(data=2, fsdp=2, tensor=2))
  # The first step of Adam is the sign of a gradient, which rounding decides where it is nearly zero.
  gradients = one.classifiers.adam.mu, eight.classifiers.adam.mu
  assert_close(*gradients)
  assert_close(one.opt_state[0].mu, eight.opt_state[0].mu)
  assert np.abs(gradients[0]).max() > 1e-4


def test_classifiers_are_trained_and_an_interrupted_run_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
  config, workdir = finished
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [line["values"]["classifier_loss"] for line in lines if line["split"] == "train"]
  assert len(losses) == 8 and min(losses) > 0
  assert np.abs(final_state(config, workdir).classifiers.classifiers).max() > 0.01
  assert_sigterm_changes_no_bit(config, workdir, tmp_path, monkeypatch)
