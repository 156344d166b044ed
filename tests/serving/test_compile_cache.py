"""Compiled programs are kept in a folder that nobody else can write to, and read again."""

import os
import subprocess
import sys

import jax

from tests.helpers.miniature_runs import ROOT
from vixml_jax.serving.compile_cache import use_compile_cache

_PROGRAM = """
import sys
from pathlib import Path
import jax
from vixml_jax.serving.compile_cache import use_compile_cache
assert use_compile_cache(Path(sys.argv[1]))
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"), hits.count("/jax/compilation_cache/cache_misses"))
"""


def test_the_next_process_reads_what_the_first_one_compiled(tmp_path):
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
  command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "new" / "cache")]
  counts = [
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.split()
    for _ in range(2)
  ]
  (first_hits, first_misses), (hits, misses) = (map(int, row) for row in counts)
  assert first_hits == 0 and first_misses > 0 and (hits, misses) == (first_misses, 0)
  assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, caplog):
  shared = tmp_path / "shared"
  shared.mkdir()
  shared.chmod(0o777)
  (tmp_path / "file").write_text("")
  former = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  try:
    for folder, message in ((shared, "others than this user can write to it"), (tmp_path / "file", "File exists")):
      assert not use_compile_cache(folder)
      assert message in caplog.text and "--compile_cache" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update("jax_compilation_cache_dir", former)


def test_the_folder_of_the_environment_takes_precedence(tmp_path):
  assert jax.config.jax_compilation_cache_dir  # That of the tests.
  former = jax.config.jax_compilation_cache_dir
  assert use_compile_cache(tmp_path / "other")
  assert jax.config.jax_compilation_cache_dir == former and not (tmp_path / "other").exists()
