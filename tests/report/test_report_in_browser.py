"""The report in Chromium: charts are drawn, the map is searched, and axe finds no serious problem."""

from pathlib import Path

import pytest

from tests.helpers.browser import open_browser, screenshot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
  """Chromium, or a skip without it."""
  with open_browser() as browser:
    yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_all_charts_are_drawn_without_errors_and_the_page_is_as_wide_as_the_window(with_images, browser, width, scheme):
  page, errors = open_report(with_images.workdir, browser, width, scheme)
  assert page.evaluate("document.querySelectorAll('[data-chart] svg').length") == page.locator("[data-chart]").count()
  assert page.evaluate("document.documentElement.scrollWidth") == width
  page.evaluate("scrollTo(0, 0)")
  screenshot(page, f"report_{width}_{scheme}.png")
  assert not errors


def test_the_map_shows_the_names_of_the_labels_that_are_searched(with_images, browser):
  page, _ = open_report(with_images.workdir, browser, 1280, "light")
  text = page.evaluate("JSON.parse(document.querySelector('#label-map').dataset.chart).points[0][3]")
  page.fill("#label-search", text)
  page.locator("#label-map svg text", has_text=text).first.wait_for(state="attached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_problem(with_images, browser, scheme):
  axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs axe: pip install -c constraints.txt -e '.[browser]'"
  )
  # axe is a script, which the policy of the page does not permit.
  page, _ = open_report(with_images.workdir, browser, 400, scheme, bypass_csp=True)
  found = axe.Axe().run(page).response["violations"]
  assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")] == []


def open_report(workdir: Path, browser, width, scheme, **how):
  """Opens the report and scrolls through it, so that all charts are drawn; returns the page and its errors."""
  page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **how).new_page()
  errors = []
  page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
  page.on("pageerror", lambda error: errors.append(str(error)))
  page.goto((workdir / "report.html").as_uri())
  for chart in page.locator("[data-chart]").all():
    chart.scroll_into_view_if_needed()
    chart.locator("svg").wait_for(state="attached")
  return page, errors
