"""Lines about the stage in progress, for logs and for terminals that are none."""

import re
import time

from vixml_jax.progress_lines import progress_lines
from vixml_jax.stages import report_step, stage


def lines_of(caplog):
  return [record.getMessage() for record in caplog.records if record.name == "vixml_jax.progress_lines"]


def test_a_stage_is_reported_with_what_is_done_its_rate_and_the_time_left(caplog):
  caplog.set_level("INFO")
  with progress_lines(0.1), stage("encode labels", total=4000, unit="item", done=500, logged=False) as current:
    for _ in range(5):
      current.advance(100)
      time.sleep(0.05)
  line = lines_of(caplog)[0]
  found = re.fullmatch(r"encode labels: ([\d,]+) of 4,000 items, ([\d,.]+) per second, 0:00:\d\d left", line)
  assert found, line
  # Units that an earlier run has done do not count for the rate.
  assert float(found[2].replace(",", "")) < 5000


def test_a_stage_that_does_not_advance_is_reported_by_its_time(caplog):
  caplog.set_level("INFO")
  with progress_lines(0.05), stage("train", total=10, unit="step", logged=False), stage("divide 9 rows", logged=False):
    time.sleep(0.2)
  assert lines_of(caplog)[0] == "divide 9 rows: in progress for 0:00:00"


def test_training_is_reported_with_its_loss_and_nothing_after_the_block(caplog):
  caplog.set_level("INFO")
  with progress_lines(0.1):
    with stage("train", total=10, unit="step", logged=False) as current:
      current.advance(2)
      report_step(2, {"loss": 0.25})
      time.sleep(0.25)
    caplog.clear()
    time.sleep(0.15)
  assert lines_of(caplog) == []


def test_a_line_of_training_ends_with_the_loss(caplog):
  caplog.set_level("INFO")
  with progress_lines(0.05), stage("train", total=10, unit="step", logged=False) as current:
    current.advance(2)
    report_step(2, {"loss": 0.25})
    time.sleep(0.15)
  assert re.fullmatch(r"train: 2 of 10 steps, [\d.,]+ per second, \d:\d\d:\d\d left, loss 0.2500", lines_of(caplog)[0])
