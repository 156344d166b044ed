"""Prints how many cases the tests of faults have tried."""


def pytest_terminal_summary(terminalreporter):
  reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
  cases = sum(value for report in reports for name, value in report.user_properties if name == "cases")
  if cases:
    terminalreporter.write_line(f"{cases:,} cases of damaged, failing and killed files")
