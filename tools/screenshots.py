"""Draws the pictures of docs/screenshots: the page of a running server and the report of its run, in four forms each.

  vixml serve --workdir=runs/quickstart --port=8080
  python -m tools.screenshots --url=http://127.0.0.1:8080 --report=runs/quickstart/report.html --output=docs/screenshots

Forms are 1280 and 400 pixels wide, light and dark. axe-core checks every form, and a serious problem ends the script.
Pictures have 256 colors, so that they are small. It needs `make browser`.
"""

import argparse
import io
from pathlib import Path
import sys
from typing import TYPE_CHECKING

from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.helpers.browser import find_browser

if TYPE_CHECKING:
  from playwright.sync_api import Browser, Page

WIDTHS = {1280: 900, 400: 800}
"""Width of the window -> its height."""
SCHEMES = ("light", "dark")


def draw_server(page: "Page", url: str, query: str, height: int) -> bytes:
  """Returns a picture of the page with the labels of a query, the first one explained."""
  page.goto(f"{url}/?q={query}")
  page.locator("#labels .answer").first.click()
  page.locator("#why-0").wait_for()
  page.get_by_label("Query").blur()
  page.mouse.move(0, 0)
  width = page.viewport_size["width"] if page.viewport_size else 0
  return page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})


def draw_report(page: "Page", report: Path) -> bytes:
  """Returns a picture of the top of a report, after all of its charts were drawn."""
  page.goto(report.resolve().as_uri())
  for chart in page.locator("[data-chart]").all():
    chart.scroll_into_view_if_needed()
    chart.locator("svg").wait_for(state="attached")
  page.evaluate("scrollTo(0, 0)")
  return page.screenshot()


def small(picture: bytes) -> bytes:
  """Returns a PNG with 256 colors."""
  buffer = io.BytesIO()
  Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
  return buffer.getvalue()


def serious(page: "Page") -> list[str]:
  """Returns the serious problems that axe-core finds on a page."""
  found = Axe().run(page).response["violations"]
  return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")]


def draw(browser: "Browser", arguments: argparse.Namespace) -> list[str]:
  """Writes all pictures and returns the problems of the pages."""
  problems = []
  for scheme in SCHEMES:
    for width, height in WIDTHS.items():
      # axe is a script, which the policies of the pages do not permit.
      context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce"
      )
      for name in ("serve", "report"):
        page = context.new_page()
        picture = (
          draw_server(page, arguments.url, arguments.query, height)
          if name == "serve"
          else draw_report(page, arguments.report)
        )
        path = arguments.output / f"{name}_{width}_{scheme}.png"
        path.write_bytes(small(picture))
        print(f"{path}: {path.stat().st_size:,} bytes")
        problems += [f"{path.name}: {problem}" for problem in serious(page)]
      context.close()
  return problems


def main() -> None:
  """Draws the pictures as the flags say."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--url", required=True, help="URL of a running server.")
  parser.add_argument("--report", required=True, type=Path, help="report.html of its run.")
  parser.add_argument("--output", required=True, type=Path, help="Folder of the pictures.")
  parser.add_argument("--query", default="cloud download", help="Query that the page answers.")
  arguments = parser.parse_args()
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=find_browser() or playwright.chromium.executable_path, args=["--no-sandbox"]
    )
    problems = draw(browser, arguments)
    browser.close()
  if problems:
    sys.exit("\n".join(problems))


if __name__ == "__main__":
  main()
