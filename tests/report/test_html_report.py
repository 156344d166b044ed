"""`report.html`: numbers of the workdir, no external resources, and texts of the data set that cannot run."""

from html.parser import HTMLParser
import json
import re

import pytest

from vixml_jax.report.examples import Example, ShownPrediction, TrueLabel
from vixml_jax.report.html_report import write_report

VOID = {"meta", "img"}
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; שלום \u202e"


class Page(HTMLParser):
  """A parsed page: elements with their attributes, texts, and the numbers in the rows of tables."""

  def __init__(self, path):
    super().__init__()
    self.elements, self.texts, self.rows, self._open = [], [], [], []
    self.feed(path.read_text(encoding="utf-8"))
    self.close()
    assert not self._open, self._open

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in VOID:
      self._open.append(tag)
    if tag == "tr":
      self.rows.append(["", []])
    if tag == "data":
      self.rows[-1][1].append(float(dict(attributes)["value"]))

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)
    if "th" in self._open and "tbody" in self._open:
      self.rows[-1][0] += data

  def values(self, name):
    """Returns the numbers of the rows with this name, in the order of the page."""
    return [values for row, values in self.rows if row == name]


def assert_self_contained(page):
  """Checks that a page has no scripts, no event handlers and no addresses except data URIs."""
  for tag, attributes in page.elements:
    assert tag not in ("script", "link", "iframe", "object", "base", "form"), tag
    assert not [name for name in attributes if name.startswith("on")], attributes
    for name in ("src", "href", "data", "action"):
      assert attributes.get(name, "data:").startswith("data:"), attributes
  styles = [text for text in page.texts if "{" in text]
  assert not any("url(" in text or "@import" in text for text in styles)
  policy = next(
    attributes["content"]
    for tag, attributes in page.elements
    if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
  )
  assert policy.startswith("default-src 'none'") and "script-src" not in policy


@pytest.fixture(scope="module")
def trained(with_images):
  """Workdir of a run with images."""
  return with_images.workdir


def test_all_numbers_are_those_of_the_workdir(trained):
  final, evaluation = (json.loads((trained / f"{name}.json").read_text()) for name in ("final_metrics", "evaluation"))
  page = Page(trained / "report.html")
  assert_self_contained(page)
  intervals = evaluation["intervals_95"]
  names = [name for name in final if "@" in name and "/" not in name]
  assert len(names) > 20
  for name in names:
    assert page.values(name) == [
      [final[name], *intervals["plain"][name], final[f"RA/{name}"], *intervals["augmented"][name]]
    ]
  columns = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10", "R@100")
  assert page.values(json.loads((trained / "config.json").read_text())["name"]) == [[final[name] for name in columns]]
  assert page.values("beaten") == [[12.5]]
  by_images = evaluation["by_images"]
  groups = [group["metrics"] for group in (*by_images.values(), evaluation["by_test_images"]["0"])]
  assert page.values("+ retrieval") == [[row[f"RA/{name}"] for name in columns] for row in (final, *groups)]
  for name, group in by_images.items():
    assert page.values(f"{group['queries']:,} queries {name}") == [[group["metrics"][column] for column in columns]]
  for decile, plain, augmented in zip(range(1, 11), *evaluation["by_label_frequency"].values(), strict=True):
    assert page.values(str(decile)) == [
      [value for key, value in row.items() if "@" in key and value is not None] for row in (plain, augmented)
    ]
  titles = [text for text in page.texts if text.startswith(("loss", "learning rate", "gradient norm", "P@1 by lambda"))]
  assert len(titles) == 5, titles


def test_logged_values_and_evaluations_between_epochs_are_shown_as_curves(trained, tmp_path):
  for name in ("config", "final_metrics", "evaluation"):
    (tmp_path / f"{name}.json").write_text((trained / f"{name}.json").read_text())
  lines = [
    (10, "train", {"loss": 0.5, "entropy": 2.0}),
    (20, "train", {"loss": float("nan"), "entropy": 1.0}),
    (20, "epoch", {"mean_loss": 0.5, "train_seconds": 7.0}),
    (20, "test", {"P@1": 10.0, "RA/P@1": 20.0, "Hit@3": 1.0}),
  ]
  (tmp_path / "metrics.jsonl").write_text(
    "".join(
      json.dumps({"step": step, "epoch": 0, "split": split, "values": values}) + "\n" for step, split, values in lines
    )
  )
  write_report(tmp_path, [], {"a": [(0, 0.0), (20, 1e-3)], "b": [(0, 0.0), (20, 1e-3)], "c": [(0, 0.0), (20, 2e-3)]})
  raw = (tmp_path / "report.html").read_text()
  assert re.findall("<figcaption>(.*?)</figcaption>", raw)[2:] == [
    "loss and its mean over each epoch",
    "learning rate of a, b",
    "learning rate of c",
    "entropy",
    "seconds per epoch",
    "P@1 on test queries",
  ]
  assert "nan" not in re.sub("<style>.*?</style>", "", raw, flags=re.DOTALL)


def test_texts_with_markup_are_shown_as_texts(trained, tmp_path):
  (tmp_path / "final_metrics.json").write_text((trained / "final_metrics.json").read_text())
  config, evaluation = (json.loads((trained / f"{name}.json").read_text()) for name in ("config", "evaluation"))
  (tmp_path / "config.json").write_text(json.dumps(config | {"name": HOSTILE}))
  (tmp_path / "evaluation.json").write_text(json.dumps(evaluation | {"baselines": {HOSTILE: {"P@1": 1.0}}}))
  label = TrueLabel(f"true {HOSTILE}", {"plain": 17, "augmented": None})
  predictions = {
    "plain": [ShownPrediction(f"hit {HOSTILE}", 0.25, True)],
    "augmented": [ShownPrediction("\x00\ud800", 0.5, False)],
  }
  write_report(tmp_path, [Example(f"query {HOSTILE}", [], predictions, [label], 4)], {})
  page = Page(tmp_path / "report.html")
  assert_self_contained(page)
  named = [f"{what}{HOSTILE}" for what in ("", "query ", "hit ", "true ")]
  for text in (*named, "\ufffd\ufffd", "17 · \N{EN DASH}", "4 more"):
    assert text in page.texts, text
  assert page.values(HOSTILE)[-1] == [1.0]
  # A text is isolated, so that right-to-left text does not reorder its neighbors.
  raw = (tmp_path / "report.html").read_text()
  assert raw.count("<bdi>") >= 5 and '<h3 dir="auto">' in raw
  assert "loss and its mean" not in raw, "a run without metrics.jsonl has no curves"
