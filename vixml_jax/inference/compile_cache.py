"""Keeps compiled programs between processes, so that a start does not wait for the compiler."""

import hashlib
import logging
import os
from pathlib import Path
import platform
import stat
import warnings

import jax

from vixml_jax.inference.shared_programs import SharedPrograms
from vixml_jax.remote import cache_root, is_remote

_MAX_BYTES = 2**30

_log = logging.getLogger(__name__)


def use_compile_cache(place: str | None = None) -> SharedPrograms | None:
  """Lets JAX store compiled programs in a folder, of which the least recently used are removed.

  Compiled programs are machine code that is run without further checks. So a folder is used only if no other user can
  write to it; otherwise a warning says why, and programs are compiled by every process. Nothing is changed where the
  user has set up JAX's cache (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE=0`).

  Args:
    place: The folder, which is made if it is missing; "" for no cache; None for `~/.cache/vixml_jax/compiled`, in
      which `XDG_CACHE_HOME` replaces `~/.cache`. Or a URL, from which the programs of this kind of machine are copied
      to that folder.

  Returns:
    What stores new programs at the URL; None without one, or if no folder can be used.
  """
  settings = jax.config.values
  if place == "" or settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
    return None
  shared = place is not None and is_remote(place)
  path = cache_root() / "compiled" if place is None or shared else Path(place)
  problem = _problem_with(path) or (_open_to_all(place) if shared and place is not None else None)
  if problem is not None:
    _log.warning("compiled programs are not kept: %s; name another folder with --compile_cache", problem)
    return None
  # An entry that another process is writing, or that was cut off, is compiled again.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
  folder = path / _machine()
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if not shared or place is None:
    return None
  # Otherwise the path of the folder is part of a program's name, and a copy in another folder is not found.
  jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  folder.mkdir(exist_ok=True)
  programs = SharedPrograms(place, folder, _machine())
  programs.fetch()
  return programs


def _open_to_all(place: str) -> str | None:
  """Returns why a shared place cannot be used: it is a local folder that any user can write to."""
  folder = Path(place.removeprefix("file://"))
  if place.startswith("file://") and folder.exists() and folder.stat().st_mode & stat.S_IWOTH:
    return f"{folder}: every user can write to it"
  return None


def _problem_with(folder: Path) -> str | None:
  """Returns why a folder cannot be used; None if it can."""
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
  """Returns a name for machines with the same instructions: a home folder may be shared by different ones."""
  try:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
  except OSError:
    lines = [platform.processor()]
  features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
  return hashlib.sha256("\n".join([platform.machine(), *features]).encode()).hexdigest()[:16]
