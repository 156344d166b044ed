"""Describes what a result was computed with: packages, source revision, devices, host."""

import importlib.metadata
import os
from pathlib import Path
import platform
import subprocess
from typing import Any

import jax

import vixml_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


def package_versions() -> dict[str, str]:
  """Returns the versions of the packages that results depend on."""
  return {name: importlib.metadata.version(name) for name in _PACKAGES} | {"vixml_jax": vixml_jax.__version__}


def describe_environment() -> dict[str, Any]:
  """Returns JSON: versions of packages, revision of the source, devices, host, and the flags of XLA."""
  device = jax.devices()[0]
  return {
    "packages": package_versions(),
    "python": platform.python_version(),
    "revision": source_revision(),
    "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    "processes": jax.process_count(),
    "host": f"{_processor()}, {os.cpu_count()} processors",
    "system": f"{platform.system()} {platform.release()}",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
  }


def source_revision(folder: Path | None = None) -> str:
  """Returns the git commit of the package's source, followed by "changed" if its files differ from the commit.

  Args:
    folder: Folder in the checkout; None for that of the package.

  Returns:
    The commit, or "unknown" if the folder is not part of a checkout or git is not installed.
  """
  folder = folder or Path(vixml_jax.__file__).parent
  try:
    if not _git(folder, "ls-files"):
      return "unknown"
    commit = _git(folder, "rev-parse", "HEAD")
    return f"{commit}, changed" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def _git(folder: Path, *arguments: str) -> str:
  """Returns what a git command prints; variables that name another repository are ignored."""
  environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
  done = subprocess.run(
    ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=10
  )
  return done.stdout.strip()


def _processor() -> str:
  """Returns the model name of the processor."""
  try:
    lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
  except OSError:
    lines = []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()
