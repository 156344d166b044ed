"""Sizes that no memory holds are refused before a run computes anything, and a lack of memory is one line."""

import re

import jax
import pytest

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.run import named_configs
from vixml_jax.run.from_config import model_from_config
from vixml_jax.run.limits import check_limits, not_enough_memory

_CHOSEN = {"encoder.dtype": "float32", "train.row_length": 64, "train.chunk_rows": 64, "train.free_vectors": 8192}


def _check(memory, monkeypatch, num_queries=300_000, **changes):
  config = named_configs.load("custom", **_CHOSEN | changes)
  monkeypatch.setattr(sharding, "device_memory", lambda devices: memory * 2**30)
  check_limits(config, model_from_config(config), sharding.make_mesh(), num_queries, 131_073)


@pytest.mark.parametrize(
  "changes,memory,message",
  [
    ({"train.epochs": 10**6, "train.batch_size": 8}, 80, "config.train.epochs=1000000: 37,500,000,000 steps of"),
    ({"train.free_vectors": 2**30}, 16, "config.train.free_vectors=1073741824 and the tables of 300,000 queries"),
    (
      {"train.batch_size": 2**18},
      16,
      "the similarities in a batch, config.train.batch_size=262144 x as many labels, need",
    ),
    ({"train.chunk_rows": 2**22}, 16, "a chunk of config.train.chunk_rows=4194304 rows of config.train.row_length=64"),
    ({"train.row_length": 2**18}, 16, "a chunk of config.train.chunk_rows=64 rows of config.train.row_length=262144"),
    ({"encoder.embed_dim": 2**20, "encoder.num_heads": 16}, 80, "the parameters of encoder, prototype and fusion"),
  ],
)
def test_a_size_beyond_the_memory_is_refused(changes, memory, message, monkeypatch):
  with pytest.raises(InputError, match=re.escape(message)) as caught:
    _check(memory, monkeypatch, **changes)
  assert "\n" not in str(caught.value) and "; use " in str(caught.value)


def test_a_run_that_fits_is_not_refused(monkeypatch):
  _check(1, monkeypatch)
  _check(1, monkeypatch, **{"train.epochs": 0, "train.batch_size": 2**22, "train.chunk_rows": 2**22})


@pytest.mark.parametrize("error", [MemoryError("480 GiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 480 GiB")])
def test_a_lack_of_memory_is_one_line(error):
  @not_enough_memory
  def run():
    raise error

  with pytest.raises(InputError, match=r"^there is not enough memory \(.*480 GiB\); lower config.train.chunk_rows"):
    run()


def test_other_errors_of_the_devices_keep_their_traceback():
  @not_enough_memory
  def run():
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    run()
