"""Lines about a long compilation."""

import logging
import time

import pytest

from vixml_jax.ahead_of_time.progress import compiling


def test_a_long_compilation_says_how_long_it_takes_and_what_is_to_come(caplog):
  caplog.set_level(logging.INFO, logger="vixml_jax.ahead_of_time.progress")
  with compiling("train step", ["encode labels", "prototypes"], interval=0.01):
    deadline = time.monotonic() + 10
    while len(caplog.messages) < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
  assert caplog.messages[0] == "compiling train step; then encode labels, prototypes"
  assert caplog.messages[1].startswith("compiling train step: 0 s so far; then encode labels")
  assert caplog.messages[-1] == "compiled train step in 0 s"


def test_a_failed_compilation_stops_its_lines(caplog):
  caplog.set_level(logging.INFO, logger="vixml_jax.ahead_of_time.progress")
  with pytest.raises(ValueError), compiling("train step", [], interval=0.01):
    raise ValueError
  seen = len(caplog.messages)
  time.sleep(0.05)
  assert len(caplog.messages) == seen
