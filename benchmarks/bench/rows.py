"""The rows of the comparison by name, in the order in which they run: the most telling ones first."""

import ast
from collections.abc import Callable
import importlib
from pathlib import Path

from benchmarks.bench.harness import Work

SIZES = ("tiny", "cpu", "gpu")
"""Sizes of the work: for tests, for a CPU, for a GPU."""

# Row -> module with a function of that name, which takes the size.
_MODULES = {
  "training": "training_rows",
  "training_names": "training_rows",
  "attention_64": "attention_rows",
  "attention_128": "attention_rows",
  "attention_256": "attention_rows",
  "exact_search": "search_rows",
  "exact_search_10k": "search_rows",
  "kmeans": "mining_rows",
  "encoding": "encoding_rows",
  "lora": "training_rows",
  "gradcache": "training_rows",
  "images": "image_rows",
  "packing": "mining_rows",
  "centroids": "mining_rows",
  "lora_3b": "training_rows",
  "approximate_search": "search_rows",
}
NAMES = tuple(_MODULES)
"""All rows."""
_ONLY_ON_GPUS = ("lora_3b",)


def names_of(size: str) -> list[str]:
  """Returns the rows that run by default at a size."""
  return [name for name in NAMES if size == "gpu" or name not in _ONLY_ON_GPUS]


def maker(name: str, size: str) -> Callable[[], Work]:
  """Returns the function that makes the work of a row; nothing of the row is imported before it is called."""

  def make() -> Work:
    return getattr(importlib.import_module(f"benchmarks.bench.{_MODULES[name]}"), name)(size)

  return make


def first_line(name: str) -> str:
  """Returns the first line of the docstring of a row, without importing what the row needs."""
  tree = ast.parse(Path(__file__).with_name(f"{_MODULES[name]}.py").read_text("utf-8"))
  (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
  return (ast.get_docstring(function) or "").splitlines()[0]
