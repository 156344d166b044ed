"""Reports of stages, steps and evaluations: who receives them, and the log lines."""

import logging
import re
import threading

import jax
import numpy as np
import pytest

from vixml_jax import stages
from vixml_jax.errors import StopTraining
from vixml_jax.stages import (
  Callback,
  counted,
  device_bytes,
  peak_memory,
  report_evaluation,
  report_step,
  reporting,
  stage,
)


class Kept(Callback):
  def __init__(self):
    self.stages, self.others = [], []

  def on_stage(self, stage):
    self.stages.append((stage.name, stage.done, stage.total, stage.ended, stage.failed))

  def on_step(self, step, metrics):
    self.others.append((step, metrics))

  on_evaluation = on_step


def test_a_stage_logs_its_start_and_its_end(caplog):
  with caplog.at_level(logging.INFO), stage("count 3 sheep"):
    assert caplog.messages == ["count 3 sheep"]
  assert re.fullmatch(
    r"count 3 sheep: done in \d+\.\d s; memory of the process: \d+\.\d\d GiB at most so far; "
    r"arrays on its devices: \d+\.\d\d GiB",
    caplog.messages[1],
  )


def test_a_stage_that_fails_or_is_not_logged_logs_no_end(caplog, monkeypatch):
  monkeypatch.setattr(stages, "_SECONDS_BETWEEN_REPORTS", 0)
  with caplog.at_level(logging.INFO), pytest.raises(RuntimeError), stage("fail", total=2, unit="try") as current:
    current.advance()
    raise RuntimeError
  with caplog.at_level(logging.INFO), stage("hidden", logged=False):
    pass
  assert caplog.messages == ["fail"]


def test_callbacks_receive_the_start_progress_and_end_of_stages_while_they_are_active(monkeypatch):
  monkeypatch.setattr(stages, "_SECONDS_BETWEEN_REPORTS", 0)
  outer, inner = Kept(), Kept()
  with reporting(outer):
    with reporting(inner), pytest.raises(KeyError), stage("read", total=5, unit="row", done=1) as current:
      current.advance(3)
      raise KeyError
    assert list(counted("ab", "spell", total=2, unit="letter")) == ["a", "b"]
    report_step(3, {"loss": 0.5})
    report_evaluation(4, {"P@1": 50.0})
  report_step(5, {"loss": 0.4})
  read = [("read", 1, 5, False, False), ("read", 4, 5, False, False), ("read", 4, 5, True, True)]
  assert inner.stages == read and not inner.others
  assert outer.stages[:3] == read and outer.stages[-1] == ("spell", 2, 2, True, False)
  assert outer.others == [(3, {"loss": 0.5}), (4, {"P@1": 50.0})]


def test_all_callbacks_are_called_though_one_stops_training():
  class Stopper(Callback):
    def on_step(self, step, metrics):
      raise StopTraining("enough")

  kept = Kept()
  with reporting(Stopper(), kept), pytest.raises(StopTraining, match="enough"):
    report_step(1, {})
  assert kept.others == [(1, {})]


def test_many_advances_are_reported_a_few_times_per_second():
  kept = Kept()
  with reporting(kept), stage("read", total=100_000, unit="row") as current:
    for _ in range(100_000):
      current.advance()
  assert len(kept.stages) < 100 and kept.stages[-1] == ("read", 100_000, 100_000, True, False)


def test_a_thread_reports_to_its_own_callbacks_only():
  kept, others = Kept(), Kept()

  def work():
    with reporting(others):
      report_step(1, {})

  with reporting(kept):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
  assert not kept.others and others.others == [(1, {})]


def test_memory_is_in_bytes():
  assert 2**20 < peak_memory() < 2**40
  before = device_bytes()
  array = jax.device_put(np.zeros(1000, np.float32), jax.devices()[1])
  assert device_bytes() - before == array.nbytes == 4000
  shards = [shard.data for shard in array.addressable_shards]  # Arrays of their own, on the same memory.
  assert device_bytes() - before == sum(shard.nbytes for shard in shards)


def test_memory_leaves_out_what_another_thread_deletes_meanwhile(monkeypatch):
  gone, array = jax.device_put(np.zeros(10, np.float32)), jax.device_put(np.zeros(1000, np.float32))
  monkeypatch.setattr(jax, "live_arrays", lambda: [gone, array])
  gone.delete()
  assert device_bytes() == 4000
