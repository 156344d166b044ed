"""Checks of a run's steps: the list of the batch that was not finite, and the warning of a collapsed model."""

import json

import numpy as np
import pytest

from tests.helpers.miniature_runs import miniature_config
from vixml_jax import datasets
from vixml_jax.input.batches import Batch
from vixml_jax.training.step_checks import BatchRows, CollapseCheck, is_finite

NAN = {"loss": float("nan"), "gradient_norm": float("inf")}


def batch_of(queries, labels, valid):
  return Batch(None, np.asarray(queries, np.int32), np.asarray(labels, np.int32), None, np.asarray(valid))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """Rows of a data set whose first training query is held out."""
  folder = tmp_path_factory.mktemp("data")
  config = miniature_config(folder, num_train=12)
  datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
  return BatchRows(config, folder, np.arange(1, 12))


def test_the_batch_that_was_not_finite_is_listed_with_rows_and_uids_and_the_message_says_what_to_try(rows):
  message = str(rows.not_finite(7, NAN, batch_of([4, 0, 0], [3, 8, 0], [True, True, False]), last_saved=4))
  assert message.startswith("step 7: the loss is nan and the gradient norm inf; the last good checkpoint is of step 4")
  assert f"2 queries and labels, from 'train/5' with 'label/3' on, are in {rows.workdir / 'not_finite.json'}" in message
  assert "with another --workdir, lower train.learning_rate" in message and "\n" not in message
  assert json.loads((rows.workdir / "not_finite.json").read_text()) == {
    "step": 7,
    "metrics": {"loss": "nan", "gradient_norm": "inf"},
    "batch": [
      {"query_row": 5, "query_uid": "train/5", "label_row": 3, "label_uid": "label/3"},
      {"query_row": 1, "query_uid": "train/1", "label_row": 8, "label_uid": "label/8"},
    ],
  }


def test_without_a_checkpoint_the_message_says_so(rows):
  message = str(rows.not_finite(1, NAN, batch_of([0], [0], [True]), last_saved=None))
  assert "no checkpoint was saved before it" in message and "None" not in message


def test_a_batch_that_cannot_be_listed_does_not_hide_the_reason_of_the_stop(rows, tmp_path):
  config = rows.config.copy_and_resolve_references()
  config.dataset.data_dir = str(tmp_path / "gone")
  message = str(BatchRows(config, tmp_path, rows.train_rows).not_finite(3, NAN, batch_of([0], [0], [True]), 2))
  assert message.startswith("step 3: the loss is nan") and "1 queries cannot be listed (" in message
  assert not (tmp_path / "not_finite.json").exists()


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_or_gradient_that_is_not_finite_is_noticed(name, value):
  good = {"loss": 0.3, "gradient_norm": 1.0}
  assert is_finite(good) and not is_finite(good | {name: value})


def warnings_of(cosines, caplog):
  caplog.clear()
  check = CollapseCheck()
  for step, cosine in enumerate(cosines, 1):
    check.add(step, cosine)
  return caplog.messages


@pytest.mark.parametrize(
  ("first", "later"),
  [
    (0.836, 1.0),  # The miniature at a learning rate of 1000.
    (0.836, 0.9942),  # The same at 1 and 10: equal but for dropout.
    (0.1, 0.985),
    (0.9995, 0.99995),
    (1.000001, 1.000001),  # A collapsed run that is continued; cosines are rounded.
  ],
)
def test_a_collapsed_model_is_reported_once(first, later, caplog):
  (message,) = warnings_of([first] * 5 + [later] * 60, caplog)
  step = 10 if first == later else 15
  assert message.startswith(f"step {step}: the model has collapsed") and "lower train.learning_rate" in message


@pytest.mark.parametrize(
  "cosines",
  [
    [0.836] + [0.91] * 50,  # The miniature.
    [0.1] + [0.9] * 50,  # Batches of one cluster of similar queries.
    [0.995] * 50,  # An encoder that starts with one direction in common.
    [0.995] + [0.9975] * 50,
    ([0.3] + [0.9999] * 9) * 5,  # Some batches of repeated queries.
    [0.0] * 50,  # Batches of one query.
    [float("nan")] * 50,
  ],
)
def test_a_run_that_has_not_collapsed_is_not_reported(cosines, caplog):
  assert warnings_of(cosines, caplog) == []
