"""A folder of compiled programs, from which the next start of a server reads them instead of compiling them again."""

import hashlib
import logging
import os
from pathlib import Path
import platform
import stat

import jax

_log = logging.getLogger(__name__)


def use_compile_cache(folder: Path) -> bool:
  """Lets JAX keep compiled programs in a folder, unless JAX_COMPILATION_CACHE_DIR already names another.

  Compiled programs are machine code that is run without further checks. So the folder is used only if no other user can
  write to it. Without a folder that can be used, the server compiles at every start.

  Args:
    folder: The folder; it is made if it is missing.

  Returns:
    Whether there is a cache.
  """
  if named := jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    _log.info("compiled programs are kept in %s", named)
  else:
    if (problem := _problem_with(folder)) is not None:
      _log.warning("compiled programs are not kept: %s; name another folder with --compile_cache", problem)
      return False
    jax.config.update("jax_compilation_cache_dir", str(folder / _machine()))
    _log.info("compiled programs are kept in %s", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  return True


def _problem_with(folder: Path) -> str | None:
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
  except OSError as error:
    return f"{folder}: {error.strerror}"
  if not os.access(folder, os.W_OK | os.X_OK):
    return f"{folder}: cannot be written to"
  if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    return f"{folder}: others than this user can write to it"
  return None


def _machine() -> str:
  """Returns a name for the instructions of this machine's processor, which programs for the CPU are compiled for."""
  try:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  except OSError:
    features = platform.processor()
  return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
