"""Compiled programs are stored for the next process, in a folder that nobody else can write to."""

import os
import subprocess
import sys

import jax
import pytest

from tests.helpers.documents import ROOT
from vixml_jax.inference.compile_cache import use_compile_cache

_COMPILE = """
import jax, sys
from vixml_jax.inference.compile_cache import use_compile_cache
use_compile_cache(*sys.argv[1:])
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(jax.config.jax_compilation_cache_dir, "/jax/compilation_cache/cache_hits" in hits)
"""


def _run(home, *arguments, **variables):
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)} | variables
  result = subprocess.run(
    [sys.executable, "-c", _COMPILE, *arguments], env=environment, capture_output=True, text=True, check=True
  )
  assert result.stderr == ""
  folder, hit = result.stdout.split()
  return folder, hit == "True"


def test_the_second_process_finds_what_the_first_compiled_and_compiles_what_is_damaged(tmp_path):
  (folder, first), (_, second) = _run(tmp_path), _run(tmp_path)
  assert folder.startswith(str(tmp_path / "vixml_jax" / "compiled"))
  assert (tmp_path / "vixml_jax" / "compiled").stat().st_mode & 0o777 == 0o700
  assert (first, second) == (False, True)
  for path in (tmp_path / "vixml_jax").rglob("*-cache"):
    path.write_bytes(b"damaged")
  assert _run(tmp_path) == (folder, False), "a damaged entry is compiled again, without a warning"


def test_the_cache_of_the_user_is_used_and_an_empty_name_is_none(tmp_path):
  assert _run(tmp_path, "x", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[0] == str(tmp_path / "mine")
  assert _run(tmp_path, "") == ("None", False)
  assert not (tmp_path / "vixml_jax").exists()


@pytest.fixture
def without_cache():
  """JAX without the cache of the tests."""
  former = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", former)


def test_a_folder_that_others_can_write_to_or_that_cannot_be_made_is_not_used(tmp_path, without_cache, caplog):
  shared, file = tmp_path / "shared", tmp_path / "file"
  shared.mkdir()
  shared.chmod(0o777)
  file.write_text("")
  for folder, message in ((shared, "others than this user can write to it"), (file, "File exists")):
    use_compile_cache(str(folder))
    assert f"{folder}: {message}" in caplog.text and "--compile_cache" in caplog.text
  assert jax.config.jax_compilation_cache_dir is None
