"""README.md says what is true: its numbers are those of docs/results.md and of the code, its figure is up to date."""

import importlib.util
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.helpers.documents import ROOT, Document
from vixml_jax.datasets.builders import EXPECTED_COUNTS

README = Document.read(ROOT / "README.md")
RESULTS = Document.read(ROOT / "docs" / "results.md")
FIGURE = ROOT / "docs" / "architecture.svg"
# Columns of the table of published sets.
SPLITS = {"train": "training queries", "labels": "labels", "test": "test queries"}
SVG = "{http://www.w3.org/2000/svg}"


def _tables(document: Document) -> list[list[dict[str, str]]]:
  """Returns the rows of every table, by the names of its columns."""
  tables = []
  for text in re.findall(r"(?:^\|.*\n)+", document.prose + "\n", re.MULTILINE):
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    tables.append([dict(zip(head, row, strict=True)) for row in rows])
  return tables


def _rows(document: Document, column: str) -> list[dict[str, str]]:
  return [row for table in _tables(document) for row in table if column in row]


def _rows_that_differ(readme: Document, results: Document) -> list[str]:
  """Returns the models of `readme` of which no row of `results` has the same name and the same numbers."""
  known = [row for row in _rows(results, "P@1") if "model" in row]
  rows = _rows(readme, "P@1")
  assert rows
  return [row["model"] for row in rows if not any(row.items() <= other.items() for other in known)]


def test_table_of_results_is_that_of_the_page():
  assert _rows_that_differ(README, RESULTS) == []


@pytest.mark.parametrize(("number", "other"), [("62.36", "62.37"), ("35.27 ± 0.03", "35.27 ± 0.04")])
def test_another_number_is_noticed(number, other, tmp_path):
  (tmp_path / "README.md").write_text((ROOT / "README.md").read_text("utf-8").replace(number, other))
  assert len(_rows_that_differ(Document.read(tmp_path / "README.md"), RESULTS)) == 1


def test_percentages_and_times_in_the_text_are_on_the_page_of_results():
  results = RESULTS.path.read_text("utf-8")
  numbers = re.findall(r"\b\d\d\.\d\d\b|\d+ min \d+ s|[\d,]+ (?=icons|test icons)", README.prose)
  assert numbers
  assert not [number for number in numbers if number.strip() not in results]


def test_sizes_of_the_published_sets_are_those_that_the_builders_check():
  rows = _rows(README, "training queries")
  assert len(rows) == 4
  for row in rows:
    name = row["config"].strip("`").replace("lf_amazon_1.3m", "lf_amazon_titles_1_3m")
    found = {split: int(row[column].replace(",", "")) for split, column in SPLITS.items()}
    assert found == EXPECTED_COUNTS[name]


# The figure.


def _script() -> Any:
  spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "tools" / "draw_architecture.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_figure_is_up_to_date_and_shown():
  assert FIGURE.read_text("utf-8") == _script().draw(), "run: python tools/draw_architecture.py"
  assert "](docs/architecture.svg)" in README.prose


def test_figure_is_readable_at_800_pixels():
  script = _script()
  svg = ElementTree.fromstring(script.draw())
  assert svg.get("width") == "800" and script.TEXT_SIZE >= 13
  boxes = [
    tuple(float(rect.get(side, "")) for side in ("x", "y", "width", "height"))
    for rect in svg.iter(f"{SVG}rect")
    if rect.get("class") in ("input", "learned", "vector", "step") and float(rect.get("width", "")) > 20
  ]
  centered = [text for text in svg.iter(f"{SVG}text") if "left" not in text.get("class", "")]
  assert len(boxes) >= 10 and centered
  for text in centered:
    x, y = float(text.get("x", "")), float(text.get("y", ""))
    # Helvetica's letters are about half as wide as the font is high; bold ones a little wider.
    half = len(text.text or "") * (0.56 * 15 if text.get("class") else 0.52 * 13) / 2
    inside = [
      box for box in boxes if box[0] <= x - half and x + half <= box[0] + box[2] and box[1] < y < box[1] + box[3]
    ]
    assert len(inside) == 1, text.text
  for i, (x, y, width, height) in enumerate(boxes):
    for left, top, *size in boxes[i + 1 :]:
      assert x + width <= left or left + size[0] <= x or y + height <= top or top + size[1] <= y


def test_figure_has_colors_for_light_and_dark_pages():
  style = ElementTree.fromstring(FIGURE.read_text("utf-8")).findtext(f"{SVG}style") or ""
  light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
  for name in re.findall(r"(\.?\w+) \{[^}]*(?:fill|stroke): #", light):
    assert re.search(rf"{re.escape(name)} \{{", dark), name
