"""Imports onnx and onnxruntime, or raises an error that says how to install them."""

import importlib
from typing import Any

from vixml_jax.errors import InputError, install_command

INSTALL = install_command("onnx")
"""Command that installs both libraries."""


def import_library(name: str) -> Any:
  """Returns a module of one of the two libraries.

  Raises:
    InputError: The module cannot be imported; the message has the command that installs it.
  """
  try:
    return importlib.import_module(name)
  except (ImportError, OSError) as error:
    raise InputError(
      f"ONNX models need the package {name.partition('.')[0]}, which cannot be imported ({error}): {INSTALL}"
    ) from error
