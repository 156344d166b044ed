"""Prints how many cases the tests of faults have tried, and spares them the waits that do not change what they find."""

import collections
import logging
import os

import pytest


def pytest_terminal_summary(terminalreporter):
  reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
  cases = collections.Counter()
  for report in reports:
    # Tests of other folders have properties of their own, which are no numbers.
    cases.update({name: count for name, count in report.user_properties if isinstance(count, int)})
  for name, count in cases.items():
    terminalreporter.write_line(f"{count:5,} {name}")
  if cases:
    terminalreporter.write_line(f"{cases.total():5,} cases of damaged, failing and killed files")


@pytest.fixture(autouse=True)
def quiet(caplog, monkeypatch):
  """The log would be full of damage that was noticed, and the disk of the machine is not switched off."""
  caplog.set_level(logging.CRITICAL)
  monkeypatch.setattr(os, "fsync", lambda descriptor: None)
