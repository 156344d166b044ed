"""Extreme multi-label retrieval from text and images, in JAX.

`vixml_jax.load(workdir).predict(["a title"])` answers queries with what training wrote.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """`load`, imported when it is asked for: importing the package itself costs nothing."""
  if name != "load":
    raise AttributeError(f"module 'vixml_jax' has no attribute {name!r}")
  return importlib.import_module("vixml_jax.inference.loading").load
