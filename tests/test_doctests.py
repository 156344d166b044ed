"""Runs the examples in the docstrings of every module that has some."""

import doctest
import importlib
from pathlib import Path

import pytest

import vixml_jax

PACKAGE = Path(vixml_jax.__file__).parent
MODULES = [
  ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
  for path in sorted(PACKAGE.rglob("*.py"))
  if ">>> " in path.read_text("utf-8") and path.parent.name != "api"  # tests/api runs those with a trained model.
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(name):
  result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
  assert result.attempted and not result.failed


@pytest.mark.parametrize("name", ["ragged", "losses", "sharding", "evaluation.metrics"])
def test_modules_that_a_newcomer_reads_first_have_examples(name):
  assert f"vixml_jax.{name}" in MODULES
