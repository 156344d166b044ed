"""Compiled programs are stored for the next process, in a folder that nobody else can write to."""

import os
import subprocess
import sys

import jax
import pytest

from tests.helpers.documents import ROOT
from vixml_jax.inference.compile_cache import use_compile_cache
from vixml_jax.inference.shared_programs import SharedPrograms

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


def test_another_machine_gets_the_programs_of_a_shared_place_and_adds_its_own(tmp_path):
  place, store = (tmp_path / "place").as_uri(), ("", "programs.store()")
  assert [_run_shared(tmp_path / name, place, end) for name, end in zip("ab", store, strict=True)] == [False, False]
  assert _run_shared(tmp_path / "c", place) is True
  damaged = list((tmp_path / "place").rglob("*-cache.*"))
  for path in damaged:
    path.write_bytes(path.read_bytes()[:-1])  # As of a server that was killed.
  assert _run_shared(tmp_path / "d", place, "programs.store()") is False
  assert damaged and _run_shared(tmp_path / "e", place) is True, "a damaged file is written again"


def _run_shared(home, place, end=""):
  """Runs a process with a cache of its own and a shared place; returns whether it found its program there."""
  code = _COMPILE.replace("use_compile_cache(*", "programs = use_compile_cache(*") + end
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)}
  result = subprocess.run(
    [sys.executable, "-c", code, place], env=environment, capture_output=True, text=True, check=True
  )
  assert result.stderr == ""
  return result.stdout.split()[1] == "True"


def test_a_shared_place_that_cannot_be_used_is_named_and_programs_are_compiled(
  tmp_path, without_cache, caplog, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  (tmp_path / "open").mkdir()
  (tmp_path / "open").chmod(0o777)
  assert use_compile_cache((tmp_path / "open").as_uri()) is None
  assert f"{tmp_path / 'open'}: every user can write to it" in caplog.text
  (tmp_path / "file").write_text("")
  programs = use_compile_cache((tmp_path / "file").as_uri())
  (programs.folder / "f-cache").write_bytes(b"program")
  assert programs.store() == 0 and f"not stored for other servers: file://{tmp_path / 'file'}" in caplog.text
  assert programs.fetch() == 0
  programs = use_compile_cache("nowhere://b/programs")
  assert programs is None or programs.fetch() == 0


def test_only_what_a_place_lacks_is_copied_to_it_and_only_what_the_folder_lacks_from_it(tmp_path):
  place = f"memory://{tmp_path.name}/programs"
  first, second = (SharedPrograms(place, tmp_path / name, "machine") for name in "ab")
  for programs, name in ((first, "f-1-cache"), (second, "g-2-cache")):
    programs.folder.mkdir()
    (programs.folder / name).write_bytes(name.encode())
  assert (first.fetch(), first.store(), first.store()) == (0, 1, 0)
  assert (second.fetch(), second.store(), second.fetch()) == (1, 1, 0)
  assert sorted(path.name for path in second.folder.iterdir()) == ["f-1-atime", "f-1-cache", "g-2-cache"]
  assert (second.folder / "f-1-cache").read_bytes() == b"f-1-cache" and first.fetch() == 1
  other = SharedPrograms(place, tmp_path / "c", "another kind of machine")
  other.folder.mkdir()
  assert other.fetch() == 0
