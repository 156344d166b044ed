"""Prints how many examples of bad input were tried, and what they gave."""

import logging

import pytest


def pytest_terminal_summary(terminalreporter):
  reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
  lines = [
    dict(report.user_properties)["bad input"] for report in reports if dict(report.user_properties).get("bad input")
  ]
  for kind, examples, refused, seconds, peak in lines:
    terminalreporter.write_line(
      f"{examples:6,} examples of {kind}: {refused:,} refused, at most {seconds:.2f} s and {peak:.0f} MiB"
    )
  if lines:
    terminalreporter.write_line(f"{sum(line[1] for line in lines):6,} examples of bad input")


@pytest.fixture(autouse=True)
def quiet(caplog):
  """The log would be full of unusual values that were noticed."""
  caplog.set_level(logging.CRITICAL)
