"""`report.html` shows the numbers of its workdir, holds all that it needs, and lets no text of a data set act."""

import base64
import dataclasses
from html.parser import HTMLParser
import io
import json
import re

import numpy as np
from PIL import Image
import pytest

from tests.helpers.miniature import read_lines, write_raw_folder
from vixml_jax import datasets
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.input.corpus import Corpus
from vixml_jax.ragged import Ragged
from vixml_jax.report.charts import Line, bar_chart, interval_chart, line_chart
from vixml_jax.report.examples import Example, ShownPrediction, TrueLabel, collect_examples
from vixml_jax.report.html_report import write_report

VOID = {"meta", "img"}
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; שלום \u202e"


class Page(HTMLParser):
  """What a browser makes of a page: elements with their attributes, texts, and cells of tables by row."""

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
    """The numbers of the rows of this name, in the order of the page."""
    return [values for row, values in self.rows if row == name]


def assert_holds_all_that_it_needs(page):
  """No script, no address but data URIs, nothing that reacts."""
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


def test_every_number_is_that_of_the_workdir(trained):
  final, evaluation = (json.loads((trained / f"{name}.json").read_text()) for name in ("final_metrics", "evaluation"))
  page = Page(trained / "report.html")
  assert_holds_all_that_it_needs(page)
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


def test_the_metrics_of_each_query_add_up_to_those_of_the_run_and_of_its_groups(trained):
  final, evaluation = (json.loads((trained / f"{name}.json").read_text()) for name in ("final_metrics", "evaluation"))
  saved = PerQuery.load(trained / "per_query.npz")
  assert saved.description["split"] == "test" and saved.description["data set"] == "custom"
  assert saved.rows["plain"].mean() == {name: final[name] for name in saved.rows["plain"].names}
  assert saved.rows["augmented"].mean() == {name: final[f"RA/{name}"] for name in saved.rows["augmented"].names}
  groups = evaluation["by_images"]
  assert sorted(groups) == ["with images", "without images"]
  assert sum(group["queries"] for group in groups.values()) == evaluation["queries"] == 16
  for name in ("P@5", "R@10", "RA/Hit@3"):  # Means over queries; PSP is no mean.
    total = sum(group["queries"] * group["metrics"][name] for group in groups.values())
    assert total / 16 == pytest.approx(final[name])


def test_evaluations_between_epochs_and_any_value_that_training_logged_become_curves(trained, tmp_path):
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


def test_texts_of_any_kind_are_shown_and_do_nothing(trained, tmp_path):
  for name in ("final_metrics", "evaluation"):
    (tmp_path / f"{name}.json").write_text((trained / f"{name}.json").read_text())
  config = json.loads((trained / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"name": HOSTILE, "baselines": {HOSTILE: {"P@1": 1.0}}}))
  label = TrueLabel(f"true {HOSTILE}", {"plain": 17, "augmented": None})
  predictions = {
    "plain": [ShownPrediction(f"hit {HOSTILE}", 0.25, True)],
    "augmented": [ShownPrediction("\x00\ud800", 0.5, False)],
  }
  write_report(tmp_path, [Example(f"query {HOSTILE}", [], predictions, [label], 4)], {})
  page = Page(tmp_path / "report.html")
  assert_holds_all_that_it_needs(page)
  named = [f"{what}{HOSTILE}" for what in ("", "query ", "hit ", "true ")]
  for text in (*named, "\ufffd\ufffd", "17 · \N{EN DASH}", "4 more"):
    assert text in page.texts, text
  assert page.values(HOSTILE)[-1] == [1.0]
  # A text is isolated, so that right-to-left text does not reorder its neighbors.
  raw = (tmp_path / "report.html").read_text()
  assert raw.count("<bdi>") >= 5 and '<h3 dir="auto">' in raw
  assert "loss and its mean" not in raw, "curves of a run that logged nothing"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Raw folder and corpus of a miniature with images; its tokens are not needed."""
  folder = tmp_path_factory.mktemp("examples")
  raw = write_raw_folder(folder / "raw", images=True)
  builder = datasets.prepare("custom", raw, folder / "data")
  names = {field.name: None for field in dataclasses.fields(Corpus)}
  return raw, Corpus(**names | dict(builder=builder, text_fields=("title",)))


def test_examples_are_the_queries_with_their_labels_ranks_and_images(corpus):
  raw, corpus = corpus
  queries, labels = read_lines(raw / "tst.json.gz"), [label["title"] for label in read_lines(raw / "lbl.json.gz")]
  truth = Ragged.from_rows([query["target_ind"] for query in queries[:15]] + [[]])
  rng = np.random.default_rng(0)
  ids = {name: np.stack([rng.permutation(24)[:10] for _ in range(16)]).astype(np.int32) for name in ("plain", "other")}
  ids["plain"][:, 3:] = -1
  scores = {name: np.linspace(1, 0, 160, dtype=np.float32).reshape(16, 10) for name in ids}
  examples = collect_examples(corpus, "test", np.arange(16), truth, ids, scores)
  assert len(examples) == 15, "the query without labels is no example"
  for query, example in enumerate(examples):
    assert example.text == queries[query]["title"]
    for name, found in ids.items():
      assert example.predictions[name] == [
        ShownPrediction(labels[label], pytest.approx(score), label in queries[query]["target_ind"])
        for label, score in list(zip(found[query], scores[name][query], strict=True))[:5]
        if label >= 0
      ]
    assert sorted(label.text for label in example.truth) == sorted(
      labels[label] for label in queries[query]["target_ind"]
    )
    for label in example.truth:
      for name, found in ids.items():
        ranked = [labels[other] if other >= 0 else None for other in found[query]]
        assert label.ranks[name] == (ranked.index(label.text) + 1 if label.text in ranked else None)
  images = [image for example in examples for image in example.images]
  assert max(len(example.images) for example in examples) == 3 and len(images) < 3 * len(examples)
  for image in images:
    head, _, data = image.partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 8)


def test_the_same_few_queries_are_drawn_for_every_model(corpus):
  truth = Ragged.from_rows([[row] for row in range(16)])
  drawn = [
    [
      example.text
      for example in collect_examples(
        corpus[1],
        "test",
        np.arange(16),
        truth,
        {"plain": np.full((16, 10), label, np.int32)},
        {"plain": np.ones((16, 10), np.float32)},
        number=4,
      )
    ]
    for label in (3, 5)
  ]
  assert len(drawn[0]) == 4 and drawn[0] == drawn[1]


def _points(path):
  return np.array([[float(number) for number in point.split()] for point in path[1:].split("L")])


def test_a_line_is_drawn_to_scale_and_keeps_its_spikes():
  chart = str(line_chart("t", [Line("l", [0, 5, 10], [1.0, 3.0, 2.0])], "step"))
  points = _points(re.search(r'<title>l</title><path d="([^"]*)"', chart)[1])
  x, y = points.T
  assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
  assert (y[0] - y[1]) / (y[2] - y[1]) == pytest.approx(2, abs=0.01), "greater values stand higher, to scale"
  assert x.min() > 0 and x.max() < 440 and y.min() > 0 and y.max() < 250
  values = np.ones(100_000)
  values[54_321], values[70_000] = 9.0, np.nan
  spiky = str(line_chart("t", [Line("l", range(100_000), values)], "step"))
  assert len(spiky) < 20_000
  heights = _points(re.search(r'<title>l</title><path d="([^"]*)"', spiky)[1])[:, 1]
  assert (heights < heights.max() - 100).sum() == 1


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e-7, 2e-7], [-5e6, 5e6], [], [float("nan")]])
def test_any_range_of_values_gives_a_chart_with_distinct_numbers_at_its_axes(values):
  chart = str(line_chart("t", [Line("l", range(len(values)), values)], "step"))
  for axis in "xy":
    ticks = re.findall(rf'<text class="{axis}"[^>]*>([^<]*)<', chart)
    assert 2 <= len(ticks) <= 9 and len(set(ticks)) == len(ticks), ticks
  assert "nan" not in chart and "inf" not in chart


def test_bars_and_intervals_are_to_scale_and_colored_by_what_they_say():
  bars = str(bar_chart("t", ["a", "b"], {"plain": [10.0, None], "augmented": [20.0, 5.0]}, "x"))
  heights = [float(height) for height in re.findall(r'height="([\d.]+)"', bars)]
  assert heights == pytest.approx([heights[1] / 2, heights[1], heights[1] / 4], abs=0.2)
  intervals = str(interval_chart("t", [("up", 2.0, 1.0, 3.0), ("down", -2.0, -3.0, -1.0), ("level", 0.5, -1.0, 2.0)]))
  assert re.findall(r'<g class="(\w+)"><title>(\w+)', intervals) == [
    ("first", "up"),
    ("second", "down"),
    ("other", "level"),
  ]
