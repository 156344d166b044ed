"""Bars on a terminal, and lines about training steps elsewhere."""

import io
import logging
import sys

import pytest

from vixml_jax.stages import ProgressBars, report_step, reporting, stage


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "file"])
def test_a_terminal_shows_bars_of_counted_stages_and_a_file_gets_lines_about_steps(stream, monkeypatch, caplog):
  stderr = stream()
  monkeypatch.setattr(sys, "stderr", stderr)
  with caplog.at_level(logging.INFO), reporting(ProgressBars()):
    with stage("think", logged=False):
      pass
    with stage("train", total=4, unit="step", done=1, logged=False) as current:
      report_step(2, {"loss": 0.25})
      current.advance()
      report_step(3, {"loss": 0.125})
      current.advance()
  if stderr.isatty():
    assert "train:  25%" in stderr.getvalue() and "4 [" in stderr.getvalue()
    assert "think" not in stderr.getvalue() and not caplog.messages
  else:
    assert not stderr.getvalue()
    assert caplog.messages == ["step 2 of 4: loss 0.2500"]  # The next one comes ten seconds later.


def test_a_stage_that_fails_closes_its_bar(monkeypatch):
  monkeypatch.setattr(sys, "stderr", Terminal())
  bars = ProgressBars()
  with reporting(bars), pytest.raises(KeyError), stage("train", total=4, unit="step"):
    raise KeyError
  assert not bars._bars
