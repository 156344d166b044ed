"""Runs the examples in the docstrings of the public names, with a trained miniature."""

import doctest
import importlib
import shutil

import pytest

import vixml_jax


@pytest.mark.parametrize("name", ["dataset", "model", "training"])
def test_examples_print_what_they_show(trained, tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  workdir = shutil.copytree(trained.model.workdir, tmp_path / "run")
  module = importlib.import_module(f"vixml_jax.api.{name}")
  names = {
    "vixml_jax": vixml_jax,
    "tmp": tmp_path,
    "raw_folder": trained.dataset.raw_dir,
    "config": trained.config,
    "workdir": workdir.relative_to(tmp_path),
    "model": vixml_jax.load(workdir),
  }
  flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  result = doctest.testmod(module, extraglobs=names, optionflags=flags)
  assert result.attempted and not result.failed
