"""Keeps the compiled programs of inference between processes, so that a first answer does not wait for the compiler."""

import hashlib
import logging
import os
from pathlib import Path
import platform
import warnings

import jax

_MAX_BYTES = 2**30
_LEAST_SECONDS = 0.1  # A program that compiles in less time is not stored.

_log = logging.getLogger(__name__)


def use_compile_cache() -> None:
  """Lets JAX store compiled programs in `~/.cache/vixml_jax/compiled`, of which the least recently used are removed.

  Nothing is changed where the user has set up JAX's cache (`JAX_COMPILATION_CACHE_DIR`,
  `JAX_ENABLE_COMPILATION_CACHE=0`), or if the folder cannot be written. `XDG_CACHE_HOME` replaces `~/.cache`.
  """
  settings = jax.config.values
  if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
    return
  folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vixml_jax" / "compiled" / _machine()
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  except OSError as error:
    _log.debug("%s: cannot be made (%s); programs are compiled by every process", folder, error.strerror)
    return
  # An entry that another process is writing, or that was cut off, is compiled again.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _machine() -> str:
  """Returns a name for machines with the same instructions: a home folder may be shared by different ones."""
  try:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
  except OSError:
    lines = [platform.processor()]
  features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
  return hashlib.sha256("\n".join([platform.machine(), *features]).encode()).hexdigest()[:16]
