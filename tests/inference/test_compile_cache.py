"""Compiled programs are stored for the next process, unless the user has set up JAX's cache."""

import os
import subprocess
import sys

from tests.helpers.documents import ROOT

_COMPILE = """
import jax, sys
from vixml_jax.inference import compile_cache
compile_cache._LEAST_SECONDS = 0.0
compile_cache.use_compile_cache()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(jax.config.jax_compilation_cache_dir, "/jax/compilation_cache/cache_hits" in hits)
"""


def _run(home, **variables):
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)} | variables
  result = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=True)
  assert result.stderr == ""
  folder, hit = result.stdout.split()
  return folder, hit == "True"


def test_the_second_process_finds_what_the_first_compiled_and_compiles_what_is_damaged(tmp_path):
  (folder, first), (_, second) = _run(tmp_path), _run(tmp_path)
  assert folder.startswith(str(tmp_path / "vixml_jax" / "compiled"))
  assert (first, second) == (False, True)
  for path in (tmp_path / "vixml_jax").rglob("*-cache"):
    path.write_bytes(b"damaged")
  assert _run(tmp_path) == (folder, False), "a damaged entry is compiled again, without a warning"


def test_the_cache_of_the_user_is_used(tmp_path):
  assert _run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[0] == str(tmp_path / "mine")
  assert not (tmp_path / "vixml_jax").exists()


def test_a_folder_that_cannot_be_made_is_not_an_error(tmp_path):
  (tmp_path / "vixml_jax").write_text("a file")
  assert _run(tmp_path) == ("None", False)
