"""The page finds labels in a browser, loads nothing from other hosts, and shows texts as texts."""

import base64
import json
import re
from urllib.parse import quote

import pytest

from tests.helpers.browser import find_browser, open_browser, screenshot
from tests.helpers.http_server import call, labels_of, running
from vixml_jax.inference.loading import load_predictor
from vixml_jax.serving.access import Access


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


@pytest.fixture(scope="module")
def browser():
  """Chromium, or a skip without it."""
  with open_browser() as browser:
    yield browser


@pytest.fixture
def open_page(browser):
  """Function that opens a page of a server; at the end, no page may have complained."""
  complaints, contexts = [], []

  def open_page(url, **options):
    contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
    page = contexts[-1].new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    return page

  yield open_page
  for context in contexts:
    context.close()
  # The browser itself writes a line for every status of an error.
  assert [text for text in complaints if "status of 4" not in text] == []


@pytest.fixture(scope="module")
def blend(texts_only):
  """Running server of a model of texts, with all rankings."""
  predictor = load_predictor(texts_only.workdir, ranking="blend")
  with running(lambda: predictor) as server:
    yield server


def uids(page):
  return page.locator("#labels .answer .uid").all_inner_texts()


def check_accessibility(page):
  """Checks the page as it is with axe-core."""
  axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs axe: pip install -c constraints.txt -e '.[browser]'"
  )
  found = axe.Axe().run(page)
  assert not found.response["violations"], found.generate_report()


@pytest.mark.slow
def test_the_page_finds_labels_by_text_and_images(with_images, predictor, server, open_page, tmp_path):
  query = next(query for query in with_images.queries if query.get("images"))
  image, other = tmp_path / "first.png", tmp_path / "notes.txt"
  image.write_bytes(query["images"][0])
  other.write_text("no image")
  page = open_page(server.url)
  page.get_by_text("24 labels, exact search").wait_for()
  page.get_by_text("Try one of these").wait_for()
  page.keyboard.type(query["title"])  # The query has the focus.
  page.keyboard.press("Enter")
  page.get_by_role("status").get_by_text("10 labels").wait_for()
  wanted = predictor.predict([{"title": query["title"]}])[0]
  assert uids(page) == [found.label for found in wanted]
  assert page.locator("#labels .score").all_inner_texts() == [f"{found.score:.3f}" for found in wanted]
  assert page.locator("#labels .bar > span").first.evaluate("bar => bar.style.width") == "100%"
  _drop(page, image)
  page.get_by_role("button", name="Remove first.png").wait_for()
  page.get_by_role("button", name="Find", exact=True).click()
  wanted = predictor.predict([{"title": query["title"], "images": [query["images"][0]]}])[0]
  page.locator("#labels .score", has_text=f"{wanted[0].score:.3f}").first.wait_for()
  assert uids(page) == [found.label for found in wanted]
  check_accessibility(page)
  page.locator("#pictures").set_input_files(other)
  page.get_by_text("Only image files can be added.").wait_for()
  other.with_suffix(".png").write_bytes(b"no image")
  page.locator("#pictures").set_input_files(other.with_suffix(".png"))
  page.get_by_label("Query").press("Enter")
  page.get_by_text("notes.png: not a PNG").wait_for()
  assert uids(page) == []  # Those of the last query are gone.
  page.get_by_role("button", name="Remove notes.png").press("Enter")
  assert page.get_by_role("button", name="Remove").count() == 1


@pytest.mark.slow
def test_ranking_dial_and_filters_of_the_page_reach_the_server(texts_only, blend, open_page):
  title = texts_only.queries[0]["title"]
  page = open_page(blend.url)
  page.get_by_text("24 labels").wait_for()
  page.get_by_text("Options").click()
  page.get_by_label("Query").fill(title)
  asked = []
  page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)

  def find():
    page.get_by_label("Query").press("Enter")
    page.get_by_role("status").get_by_text("label").wait_for()
    return labels_of(call(blend, "/v1/predict", json.dumps(asked[-1])))[0]

  page.get_by_label("Rare labels").fill("0.7")
  assert [found[0] for found in find()] == uids(page)
  assert asked[-1]["ranking"] == "blend" and asked[-1]["tail"] == 0.7
  page.get_by_label("Ranking").select_option("plain")
  assert page.get_by_label("Rare labels").is_hidden()
  page.get_by_label("Not these labels").fill("label/0\n\n label/1 ")
  page.get_by_label("Only these labels").fill("label/1\nlabel/2\nlabel/3")
  assert sorted(found[0] for found in find()) == sorted(uids(page)) == ["label/2", "label/3"]
  assert asked[-1]["ranking"] == "plain" and "tail" not in asked[-1]
  page.get_by_label("Only these labels").fill("nothing")
  page.get_by_label("Query").press("Enter")
  page.get_by_text("allow[0]: there is no label 'nothing'").wait_for()
  assert page.locator("#status.bad").count() == 1


@pytest.mark.slow
def test_keys_addresses_and_examples_of_the_page(blend, open_page):
  page = open_page(blend.url)
  chip = page.locator("#chips button").first
  text = chip.inner_text()
  chip.click()
  page.locator("#labels .answer").first.wait_for()
  assert page.url == f"{blend.url}/?q={quote(text)}" and page.locator("#examples").is_hidden()
  first = uids(page)
  page.get_by_label("Query").focus()
  for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
    page.keyboard.press(key)
  answer = page.locator("#labels .answer").first
  assert answer.get_attribute("aria-expanded") == "true" and answer.evaluate("it => it === document.activeElement")
  page.locator("#why-0").get_by_text(re.compile("training queries")).wait_for()
  reply = call(blend, "/v1/predict", json.dumps({"queries": [{"title": text}], "explain": True}))
  near = reply.json["answers"][0]["predictions"][0]["why"]["neighbors"]
  shown = page.locator("#why-0 li").all_inner_texts()
  assert near and len(shown) == len(near)
  for line, each in zip(shown, near, strict=True):
    assert each["text"] in line and f"similarity {each['score']:.3f}" in line
  check_accessibility(page)
  page.keyboard.press("/")
  page.keyboard.type("rain")  # The former query was selected.
  page.keyboard.press("Enter")
  page.wait_for_url("**/?q=rain")
  page.go_back()
  page.wait_for_function("uid => document.querySelector('#labels .uid')?.textContent === uid", arg=first[0])
  assert page.get_by_label("Query").input_value() == text and uids(page) == first
  again = open_page(page.url)  # A link to a query.
  again.locator("#labels .answer").first.wait_for()
  assert uids(again) == first


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_is_accessible_in_every_state(blend, open_page, scheme):
  page = open_page(blend.url, color_scheme=scheme)
  page.set_viewport_size({"width": 400, "height": 800})
  page.get_by_text("Try one of these").wait_for()
  page.get_by_text("Options").click()
  check_accessibility(page)
  held = []
  page.route("**/v1/predict", lambda route: held.append(route))
  page.locator("#chips button").first.click()
  page.get_by_text("Searching").wait_for()
  assert page.get_by_role("button", name="Find", exact=True).is_disabled() and uids(page) == []
  check_accessibility(page)
  held[0].continue_()
  page.locator("#labels .answer").first.click()
  check_accessibility(page)
  assert page.evaluate("document.documentElement.scrollWidth") <= 400
  for width in (400, 1280):
    page.set_viewport_size({"width": width, "height": 800})
    screenshot(page, f"serve_{width}_{scheme}.png", full_page=True)
  page.unroute("**/v1/predict")
  page.route("**/v1/predict", lambda route: route.fulfill(json={"answers": [{"uid": None, "predictions": []}]}))
  page.get_by_label("Query").press("Enter")
  page.get_by_text("No label was found.").wait_for()


@pytest.mark.slow
def test_texts_of_the_data_are_never_markup(blend, open_page):
  page = open_page(blend.url)
  page.get_by_text("24 labels").wait_for()
  markup = "<img src=x onerror=alert(1)>"
  label = {"label": "<b>x</b>", "id": 0, "text": markup}
  near = {"row": 1, "text": "<s>rain</s> rain", "score": 0.5, "words": ["<i>w</i>", "rain"], "labels": [label]}
  hostile = label | {"score": 0.5, "why": {"words": ["<u>w</u>"], "neighbors": [near]}}
  answers = {"answers": [{"uid": None, "predictions": [hostile]}]}
  page.route("**/v1/predict", lambda route: route.fulfill(json=answers))
  page.goto(f"{blend.url}/?q={quote(markup)}")
  page.locator("#labels .answer").click()
  page.get_by_text("its labels").wait_for()
  assert page.locator("#labels img, #labels b, #labels i, #labels u, #labels s").count() == 0
  assert page.locator(".why li").inner_text().startswith("<s>rain</s> rain, with <i>w</i>")
  assert page.locator(".why li mark").all_inner_texts() == ["rain", "rain", "<i>w</i>"]
  assert page.get_by_label("Query").input_value() == markup


@pytest.mark.slow
def test_the_page_asks_for_the_key_of_a_server_that_has_one(predictor, open_page):
  with running(lambda: predictor, access=Access.of("127.0.0.1", keys=["secret"])) as server:
    page = open_page(server.url)
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use").click()
    page.get_by_text("The API key is not valid.").wait_for()
    check_accessibility(page)
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Use").click()
    page.locator("#chips button").first.click()
    page.locator("#labels .answer").first.wait_for()
    linked = open_page(f"{server.url}/?q=sun")  # Another tab, which has no key.
    for key in ("wrong", "secret"):
      linked.get_by_label("API key").fill(key)
      linked.get_by_role("button", name="Use").click()
    linked.locator("#labels .answer").first.wait_for()
    assert linked.get_by_label("Query").input_value() == "sun" and linked.url == f"{server.url}/?q=sun"


@pytest.mark.slow
def test_an_answer_of_a_proxy_shows_its_status(blend, open_page):
  page = open_page(blend.url)
  page.get_by_text("24 labels").wait_for()
  refused = dict(status=413, content_type="text/html", body="<html><h1>413 Request Entity Too Large</h1></html>")
  login = dict(status=200, content_type="text/html", body="<html>Log in</html>")
  other = dict(status=403, json={"error": "denied"})
  for answer, shown in ((refused, "413 Payload Too Large"), (login, "200 OK"), (other, "403 Forbidden")):
    page.unroute_all()
    page.route("**/v1/predict", lambda route, _, answer=answer: route.fulfill(**answer))
    page.get_by_label("Query").fill("sun")
    page.get_by_label("Query").press("Enter")
    page.get_by_text(f"The server answered with status {shown}.", exact=True).wait_for()
    assert page.locator("#status.bad").count() == 1


def test_the_browser_is_that_of_the_variable_or_one_of_the_path(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.delenv("CHROMIUM", raising=False)
  assert find_browser() is None
  for name in ("google-chrome", "chromium"):  # The second is preferred.
    (tmp_path / name).write_text("")
    (tmp_path / name).chmod(0o700)
    assert find_browser() == str(tmp_path / name)
  monkeypatch.setenv("CHROMIUM", "/opt/chromium")
  assert find_browser() == "/opt/chromium"


@pytest.mark.slow
def test_screenshots_are_written_where_the_variable_names_a_folder(browser, tmp_path, monkeypatch):
  page = browser.new_page()
  monkeypatch.delenv("SCREENSHOTS", raising=False)
  screenshot(page, "serve_400_dark.png")
  monkeypatch.setenv("SCREENSHOTS", str(tmp_path / "new"))
  screenshot(page, "report_400_dark.png")
  assert [path.name for path in tmp_path.rglob("*.png")] == ["report_400_dark.png"]
  with pytest.raises(AssertionError, match="docs/screenshots has no other.png"):
    screenshot(page, "other.png")


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
