"""The names of the package: imported late, complete, and visible to type checkers."""

import ast
from pathlib import Path
import subprocess
import sys

import pytest

import vixml_jax

SOURCE = ast.parse(Path(vixml_jax.__file__).read_text("utf-8"))


def test_names_are_the_same_for_users_type_checkers_and_dir():
  (block,) = (node for node in SOURCE.body if isinstance(node, ast.If))
  typed = {alias.name: node.module for node in block.body for alias in node.names}
  assert sorted(typed) == sorted(vixml_jax.__all__)
  assert set(vixml_jax.__all__) <= set(dir(vixml_jax))
  for name, module in typed.items():
    assert getattr(vixml_jax, name) is getattr(sys.modules[module], name)


def test_every_public_name_has_a_docstring():
  for name in vixml_jax.__all__:
    assert len(getattr(vixml_jax, name).__doc__.splitlines()) >= 1, name


def test_importing_the_package_and_the_callbacks_imports_nothing_heavy():
  code = (
    "import vixml_jax, sys; vixml_jax.Callback, vixml_jax.ProgressBars, vixml_jax.StopTraining; dir(vixml_jax);"
    "print({'jax', 'numpy', 'pyarrow'} & set(sys.modules))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout == "set()\n", done.stderr


def test_an_unknown_name_is_an_error():
  with pytest.raises(AttributeError, match="has no attribute 'laod'"):
    vixml_jax.laod  # noqa: B018
