"""Extreme multi-label retrieval from text and images, in JAX.

`train` makes a model from a `Dataset`, and `load` opens a trained one. Importing the package costs nothing: a name is
imported when it is first used.

Example:
  import vixml_jax

  dataset = vixml_jax.Dataset.from_table("products.csv")
  model = vixml_jax.train(dataset, workdir="runs/products")
  model.predict(["wool socks"], k=3)
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from vixml_jax.api.dataset import Dataset, LabeledQuery
  from vixml_jax.api.model import Model, load
  from vixml_jax.api.training import train
  from vixml_jax.errors import InputError, Preempted, StopTraining
  from vixml_jax.inference.predictions import Prediction
  from vixml_jax.stages import Callback, ProgressBars, Stage

__version__ = "0.1.0"

__all__ = [
  "Callback",
  "Dataset",
  "InputError",
  "LabeledQuery",
  "Model",
  "Prediction",
  "Preempted",
  "ProgressBars",
  "Stage",
  "StopTraining",
  "load",
  "train",
]

# Name -> its module.
_MODULES = {
  "Callback": "stages",
  "Dataset": "api.dataset",
  "InputError": "errors",
  "LabeledQuery": "api.dataset",
  "Model": "api.model",
  "Preempted": "errors",
  "Prediction": "inference.predictions",
  "ProgressBars": "stages",
  "Stage": "stages",
  "StopTraining": "errors",
  "load": "api.model",
  "train": "api.training",
}

# A program that sets up no logging sees no messages of this package.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
  """Imports a public name when it is first used."""
  if name not in _MODULES:
    raise AttributeError(f"module 'vixml_jax' has no attribute {name!r}")
  value = getattr(importlib.import_module(f"vixml_jax.{_MODULES[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
