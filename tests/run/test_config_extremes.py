"""Runs start with every value at the end of its range, or are refused in one line: no traceback, no hang."""

import re

import pytest

from tests.helpers.config_trials import ENCODERS, TRAINED, Trials, base_config, cases_of
from vixml_jax.experiment import train_and_evaluate

# Enough to notice that sizes, rates, places and searches are checked; the others are slow.
_QUICK = {"train.chunk_rows": 2**22, "train.free_vectors": 2**30, "train.epochs": 10**6, "train.learning_rate": 1.0}


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
  """The kind of a run, its config, and a folder with a trained workdir `base`."""
  folder = tmp_path_factory.mktemp(request.param)
  config = base_config(request.param, folder)
  train_and_evaluate(config, folder / "base")
  return request.param, config.unlock(), folder


def _tried(run, cases):
  """Tries all cases; returns how many trained and the lines of the others."""
  _, config, folder = run
  bugs, lines, trained, trials = [], [], 0, Trials()
  for number, (key, value) in enumerate(cases):
    print(f"{number + 1} of {len(cases)}: {key}={value!r}"[:100], flush=True)
    try:
      outcome = trials.try_value(config, key, value, folder / "base", folder / f"run{number}")
    except AssertionError as error:
      bugs.append(f"{key}={value!r}"[:100] + f": {error}"[:300])
      print(bugs[-1], flush=True)
      continue
    trained += outcome == TRAINED
    lines += [outcome] * (outcome != TRAINED)
  assert not bugs, "\n".join(bugs)
  return trained, lines


@pytest.mark.slow
@pytest.mark.parametrize("run", ["texts"], indirect=True)
def test_a_few_extreme_values_train_or_are_refused(run):
  trained, lines = _tried(run, _QUICK.items())
  assert trained == 2
  assert re.search(r"config\.train\.chunk_rows=4194304 rows", lines[0])
  assert "train.free_vectors=1073741824: 8 give each of the 8 labels its own" in lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("run", ENCODERS, indirect=True)
def test_every_extreme_value_trains_or_is_refused(run):
  kind, config, _ = run
  cases = cases_of(kind, config)
  trained, lines = _tried(run, cases)
  print(f"{kind}: {len(cases)} cases, {trained} trained, {len(lines)} refused")
  assert trained > len(cases) // 4, "\n".join(lines)
