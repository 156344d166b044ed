"""Imports the libraries of the blend, LightGBM and scikit-learn, when they are needed."""

import importlib
from typing import Any

from vixml_jax.errors import InputError

_LIBRARIES = ("lightgbm", "sklearn.feature_extraction.text")


def check_blend_libraries() -> None:
  """Checks that both libraries can be imported.

  Raises:
    InputError: One of them cannot; the message says why.
  """
  for name in _LIBRARIES:
    import_library(name)


def import_library(name: str) -> Any:
  """Returns a module of one of the libraries.

  Raises:
    InputError: The module cannot be imported. LightGBM also needs the system's libgomp, whose absence is an OSError.
  """
  try:
    return importlib.import_module(name)
  except (ImportError, OSError) as error:
    raise InputError(
      f"the blend needs the package {name.partition('.')[0]}, which cannot be imported ({error}); install it (LightGBM "
      "also needs the system's libgomp: apt install libgomp1), or do without the blend (config.eval.blend=False, "
      "another --ranking) and without the baselines tfidf and plt"
    ) from error
