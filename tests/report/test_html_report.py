"""`report.html`: numbers of the workdir, no external resources, and texts of the data set that cannot run."""

import base64
import hashlib
from html.parser import HTMLParser
import json
import re

import numpy as np
import pytest

from vixml_jax.report.examples import Example, ShownPrediction, TrueLabel
from vixml_jax.report.html_report import write_report
from vixml_jax.report.label_map import LabelMap

VOID = {"meta", "img", "input"}
NO_MAP = LabelMap([], [], np.zeros((0, 2), np.float32))
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
  """Checks that a page has its two scripts only, no event handlers, and addresses of itself and of data only."""
  for tag, attributes in page.elements:
    assert tag not in ("link", "iframe", "object", "base", "form"), tag
    assert not [name for name in attributes if name.startswith("on")], attributes
    for name in ("src", "href", "data", "action"):
      assert attributes.get(name, "data:").startswith(("data:", "#")), attributes
  scripts = [text for text in page.texts if "ECharts" in text]
  assert len(scripts) == 2 == len([tag for tag, _ in page.elements if tag == "script"])
  styles = [text for text in page.texts if "{" in text and text not in scripts]
  assert not any("url(" in text or "@import" in text for text in styles)
  policy = next(
    attributes["content"]
    for tag, attributes in page.elements
    if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
  )
  assert policy.startswith("default-src 'none'; script-src 'sha256-") and policy.count("'unsafe-inline'") == 1
  for script in scripts:
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def charts_of(page):
  """Returns the charts of a page: their titles, and the data that a script draws."""
  return {
    attributes["aria-label"]: json.loads(attributes["data-chart"])
    for _, attributes in page.elements
    if "data-chart" in attributes
  }


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
  shown = ("loss", "learning rate", "gradient norm", "P@1 by lambda")
  titles = [title for title in charts_of(page) if title.startswith(shown)]
  assert len(titles) == 4, titles


def test_contents_name_every_section(trained):
  elements = Page(trained / "report.html").elements
  links = [attributes["href"] for tag, attributes in elements if tag == "a"]
  sections = [f"#{attributes['id']}" for tag, attributes in elements if tag == "h2"]
  assert links == sections and {"#confusions", "#map", "#random", "#worst", "#best", "#run"} <= set(links)


def test_the_summary_is_of_the_ranking_of_highest_precision_beside_the_best_baseline(trained):
  final = json.loads((trained / "final_metrics.json").read_text())
  page = Page(trained / "report.html")
  start = page.texts.index("P@1")
  best = max(final["P@1"], final["RA/P@1"], final.get("blend/P@1", 0))
  assert page.texts[start + 1] == f"{best:.2f}" and page.texts[start + 2] == "best baseline: 12.50, "


def test_confused_labels_are_counted_over_all_queries(trained):
  evaluation = json.loads((trained / "evaluation.json").read_text())
  for row, pairs in evaluation["confusions"].items():
    assert all(2 <= pair["queries"] <= pair["of"] for pair in pairs), row
    assert [pair["queries"] for pair in pairs] == sorted((pair["queries"] for pair in pairs), reverse=True)


def test_config_and_hardware_are_shown(trained):
  config = json.loads((trained / "config.json").read_text())
  texts = Page(trained / "report.html").texts
  assert str(config["train"]["learning_rate"]) in texts and "train.learning_rate" in texts
  assert any("cpu" in text for text in texts) and "XLA_FLAGS" in texts


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
  rates = {"a": [(0, 0.0), (20, 1e-3)], "b": [(0, 0.0), (20, 1e-3)], "c": [(0, 0.0), (20, 2e-3)]}
  write_report(tmp_path, {}, rates, NO_MAP)
  raw = (tmp_path / "report.html").read_text()
  charts = charts_of(Page(tmp_path / "report.html"))
  assert charts["loss and its mean over each epoch"]["lines"][0]["points"] == [[10.0, 0.5]], "NaN is left out"
  assert re.findall("<figcaption>(.*?)</figcaption>", raw)[2:] == [
    "loss and its mean over each epoch",
    "learning rate of a, b",
    "learning rate of c",
    "entropy",
    "seconds per epoch",
    "P@1 on test queries",
  ]


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
  examples = {"random": [Example(f"query {HOSTILE}", [], predictions, [label], 4)]}
  write_report(tmp_path, examples, {}, LabelMap([HOSTILE] * 5, [1] * 5, np.zeros((5, 2), np.float32)))
  page = Page(tmp_path / "report.html")
  assert_self_contained(page)
  named = [f"{what}{HOSTILE}" for what in ("", "query ", "hit ", "true ")]
  for text in (*named, "\ufffd\ufffd", "17 · \N{EN DASH}", "4 more"):
    assert text in page.texts, text
  assert page.values(HOSTILE)[-1] == [1.0]
  assert {point[3] for point in charts_of(page)["map of labels"]["points"]} == {HOSTILE}
  # A text is isolated, so that right-to-left text does not reorder its neighbors.
  raw = (tmp_path / "report.html").read_text()
  assert raw.count("<bdi>") >= 5 and '<h3 dir="auto">' in raw
  assert "loss and its mean" not in raw, "a run without metrics.jsonl has no curves"
