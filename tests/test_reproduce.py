"""docs/reproduce.md has a command for every row that the configs publish, with the same numbers, and no other row."""

import ast
import re

import pytest

from tests.helpers.documents import ROOT, Document
from tests.helpers.repository import load_config

NAMES = ("lf_amazon_titles_131k", "lf_amazon_131k", "mm_amazon_titles_300k", "lf_amazon_1.3m")
_NUMBER = r"(\d\d\.\d\d)"
_IN_DOCSTRING = " / ".join([_NUMBER] * 4)
_ON_PAGE = r" \| ".join([_NUMBER] * 4)
PAGE = Document.read(ROOT / "docs" / "reproduce.md")


def _docstring(name):
  return ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text("utf-8")), clean=False)


def _published(name):
  """The rows of a config's docstring: variant -> P@1, P@5, PSP@1, R@100."""
  text, images = _docstring(name).split("\nwith 3 images (")
  row = re.compile(rf"^  ([a-z]\S+) +{_IN_DOCSTRING}", re.MULTILINE)
  rows = {f"encoder={match[1]}": match.groups()[1:] for match in row.finditer(text)}
  return rows | {f"encoder={match[1]},images=3": match.groups()[1:] for match in row.finditer(images)}


def _on_page(name):
  row = re.compile(rf"^\| `configs/{re.escape(name)}\.py:(\S+)` \| {_ON_PAGE} \|$", re.MULTILINE)
  return {match[1]: match.groups()[1:] for match in row.finditer(PAGE.prose)}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_page_are_those_of_the_docstrings(name):
  rows = _published(name)
  assert len(rows) == (12 if name == "lf_amazon_titles_131k" else 10)
  assert _on_page(name) == rows
  for variant in rows:
    load_config(f"configs/{name}.py:{variant}")
  best = re.search(rf"retrieval augmentation:\n +{_IN_DOCSTRING}$", _docstring(name), re.MULTILINE)
  assert f"| best with retrieval augmentation | {' | '.join(best.groups())} |" in PAGE.prose


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_command_hardware_and_hours(name):
  docstring = _docstring(name)
  assert f"python -m vixml_jax.main --config=configs/{name}.py" in docstring
  assert "\nHardware: " in docstring
  (hours,) = re.findall(r"^Hours.*(?:\n(?!Published).*)*", docstring, re.MULTILINE)
  # A reader must see where the hours come from: nobody has measured them with this package.
  assert re.search("not measured|neither measured", hours)


def test_the_first_experiments_have_the_numbers_of_their_rows():
  rows = _published("lf_amazon_titles_131k")
  first = PAGE.prose.split("## The first three experiments")[1].split("### 1.")[0]
  for variant in ("encoder=distilbert", "encoder=qwen2.5-0.5b"):
    for images in ("", ",images=3"):
      assert f"| {' | '.join(rows[variant + images])} |" in first
