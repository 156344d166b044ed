"""Log lines of stages."""

import logging
import re

import jax
import numpy as np
import pytest

from vixml_jax.stages import device_bytes, peak_memory, stage


def test_a_stage_logs_its_start_and_its_end(caplog):
  with caplog.at_level(logging.INFO), stage("count 3 sheep"):
    assert caplog.messages == ["count 3 sheep"]
  assert re.fullmatch(
    r"count 3 sheep: done in \d+\.\d s; memory of the process: \d+\.\d\d GiB at most so far; "
    r"arrays on its devices: \d+\.\d\d GiB",
    caplog.messages[1],
  )


def test_a_stage_that_fails_or_is_not_shown_logs_no_end(caplog):
  with caplog.at_level(logging.INFO), pytest.raises(RuntimeError), stage("fail"):
    raise RuntimeError
  with caplog.at_level(logging.INFO), stage("hidden", shown=False):
    pass
  assert caplog.messages == ["fail"]


def test_memory_is_in_bytes():
  assert 2**20 < peak_memory() < 2**40
  before = device_bytes()
  array = jax.device_put(np.zeros(1000, np.float32), jax.devices()[1])
  assert device_bytes() - before == array.nbytes == 4000
  shards = [shard.data for shard in array.addressable_shards]  # Arrays of their own, on the same memory.
  assert device_bytes() - before == sum(shard.nbytes for shard in shards)
