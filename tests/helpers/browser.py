"""The browser of the tests of pages, and their screenshots."""

import contextlib
import os
from pathlib import Path
import shutil

import pytest

from tests.helpers.documents import ROOT


def find_browser():
  """Returns the path of Chromium or Chrome: that of the variable CHROMIUM, or one of the path; None without one."""
  return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@contextlib.contextmanager
def open_browser():
  """Runs the browser; skips the test without one."""
  sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install -c constraints.txt -e '.[browser]'"
  )
  with sync_api.sync_playwright() as playwright:
    path = find_browser() or playwright.chromium.executable_path  # Where `playwright install` puts it.
    if not Path(path).exists():
      pytest.skip("needs Chromium: `make browser` or `apt-get install chromium`, or set CHROMIUM to its path")
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield browser
    browser.close()


def screenshot(page, name, **how):
  """Writes a screenshot into the folder of the variable SCREENSHOTS, if it is set, under a name of docs/screenshots."""
  assert (ROOT / "docs" / "screenshots" / name).exists(), f"docs/screenshots has no {name}"
  if folder := os.environ.get("SCREENSHOTS"):
    page.screenshot(path=f"{folder}/{name}", **how)
