"""The page finds labels in a browser, loads nothing from other hosts, and shows texts as texts."""

import base64
import os
from pathlib import Path
import re
import shutil

import pytest

from tests.helpers.http_server import call


def test_the_page_loads_nothing_from_elsewhere(server):
  page = call(server, "/")
  assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
  assert page.headers["Content-Type"] == "text/html; charset=utf-8"
  links = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
  assert {"/page.css", "/page.js"} <= set(links)
  for link in links:
    if not link.startswith("data:"):
      reply = call(server, link)
      assert reply.status == 200 and b"http://" not in reply.body


@pytest.mark.slow
def test_the_page_finds_labels_in_a_browser(with_images, predictor, server, tmp_path):
  sync_api = pytest.importorskip("playwright.sync_api", reason="a browser tests the page: pip install playwright")
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if not chromium:
    pytest.skip("a browser tests the page: install chromium")
  query = next(query for query in with_images.queries if query.get("images"))
  image, other = tmp_path / "first.png", tmp_path / "notes.txt"
  image.write_bytes(query["images"][0])
  other.write_text("no image")
  screenshots = Path(os.environ.get("SCREENSHOTS", tmp_path))
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 900, "height": 900})
    complaints = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    page.get_by_text("24 labels, exact search").wait_for()
    page.screenshot(path=screenshots / "empty.png")
    page.keyboard.type(query["title"])  # The title has the focus.
    page.keyboard.press("Enter")
    page.get_by_role("status").get_by_text("10 labels").wait_for()
    wanted = predictor.predict([{"title": query["title"]}])[0]
    assert page.locator("#labels .uid").all_inner_texts() == [found.label for found in wanted]
    assert page.locator("#labels .score").all_inner_texts() == [f"{found.score:.3f}" for found in wanted]
    _drop(page, image)
    page.get_by_role("button", name="Remove first.png").wait_for()
    page.get_by_role("button", name="Find labels").click()
    wanted = predictor.predict([{"title": query["title"], "images": [query["images"][0]]}])[0]
    page.locator("#labels .score", has_text=f"{wanted[0].score:.3f}").first.wait_for()
    assert page.locator("#labels .uid").all_inner_texts() == [found.label for found in wanted]
    page.screenshot(path=screenshots / "light.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=screenshots / "dark.png", full_page=True)
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=screenshots / "narrow.png", full_page=True)
    page.get_by_label("Images", exact=False).first.set_input_files(other)
    page.get_by_text("Only image files can be added.").wait_for()
    other.with_suffix(".png").write_bytes(b"no image")
    page.get_by_label("Images", exact=False).first.set_input_files(other.with_suffix(".png"))
    page.get_by_label("Title").press("Enter")
    page.get_by_text("notes.png: not a PNG").wait_for()
    page.screenshot(path=screenshots / "error.png", full_page=True)
    page.get_by_role("button", name="Remove notes.png").press("Enter")
    assert page.get_by_role("button", name="Remove").count() == 1
    assert [text for text in complaints if "422" not in text] == []
    hostile = {"label": "<b>x</b>", "id": 0, "text": "<img src=x onerror=alert(1)>", "score": 0.5}
    answers = {"answers": [{"uid": None, "predictions": [hostile]}]}
    page.route("**/v1/predict", lambda route: route.fulfill(json=answers))
    page.get_by_role("button", name="Find labels").click()
    page.get_by_text(hostile["text"]).wait_for()
    assert page.locator("#labels img, #labels b").count() == 0
    browser.close()


def _drop(page, path):
  """Drops a file onto the page, as a user does with a mouse."""
  data = page.evaluate_handle(
    """([name, content]) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], name, {type: "image/png"}));
        return data;
      }""",
    [path.name, base64.b64encode(path.read_bytes()).decode()],
  )
  page.dispatch_event("#drop", "dragover", {"dataTransfer": data})
  page.dispatch_event("#drop", "drop", {"dataTransfer": data})
