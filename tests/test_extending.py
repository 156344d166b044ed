"""Runs the worked examples of docs/extending.md."""

import importlib.util
from pathlib import Path
import re
import sys

import pytest

from vixml_jax.datasets import builders
from vixml_jax.models import dual_encoder

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def code_of(section):
  """The Python blocks of a section, joined to one script."""
  return "\n".join(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", ["An encoder", "A loss", "A data set", "A metric", "A search back end"])
def test_the_worked_example_runs(name, tmp_path, monkeypatch):
  # Copies, so that what an example registers is gone afterwards.
  monkeypatch.setattr(dual_encoder, "ARCHITECTURES", dict(dual_encoder.ARCHITECTURES))
  monkeypatch.setattr(builders, "BUILDERS", dict(builders.BUILDERS))
  monkeypatch.setattr(builders, "EXPECTED_COUNTS", dict(builders.EXPECTED_COUNTS))
  path = tmp_path / "worked_example.py"  # TFDS looks for the file of a builder's module.
  path.write_text(code_of(SECTIONS[name]))
  spec = importlib.util.spec_from_file_location("worked_example", path)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, "worked_example", module)
  spec.loader.exec_module(module)
