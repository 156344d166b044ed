"""Describes what a result was computed with: packages, source revision, devices, host."""

import contextlib
import importlib.metadata
import os
from pathlib import Path
import platform
import subprocess
from typing import Any

import jax

import vixml_jax

_PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers", "safetensors"),
  *("tensorflow-datasets", "array-record", "scipy", "scikit-learn", "lightgbm", "pillow"),
)
# Only where they are installed.
_OPTIONAL = ("scann", "libtpu", "jax-cuda12-pjrt", "jax-cuda12-plugin", "nvidia-cudnn-cu12", "onnxruntime")
# Variables that change results or the compiled programs, besides those that start with JAX_.
_VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC")


def package_versions() -> dict[str, str]:
  """Returns the versions of the packages that results depend on."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  for name in _OPTIONAL:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions | {"vixml_jax": vixml_jax.__version__}


def describe_environment() -> dict[str, Any]:
  """Returns JSON: versions of packages, revision of the source, devices, host, and the flags of XLA and JAX."""
  device = jax.devices()[0]
  return {
    "packages": package_versions(),
    "python": platform.python_version(),
    "revision": source_revision(),
    "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    "backend": " ".join(device.client.platform_version.split()),
    "processes": jax.process_count(),
    "host": f"{_processor()}, {os.cpu_count()} processors",
    "system": f"{platform.system()} {platform.release()}",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    "variables": {
      name: value for name, value in sorted(os.environ.items()) if name in _VARIABLES or name.startswith("JAX_")
    },
  }


def source_revision(folder: Path | None = None) -> str:
  """Returns the git commit of the package's source, followed by "changed" if its files differ from the commit.

  New files that git does not ignore count as changes.

  Args:
    folder: Folder of the source; None for that of the package.

  Returns:
    The commit; or the version of the package, if the folder is not part of a checkout, as in an installed wheel, or git
    is not installed.
  """
  folder = folder or Path(vixml_jax.__file__).parent
  try:
    if _git(folder, "ls-files"):
      commit = _git(folder, "rev-parse", "HEAD")
      changes = _git(folder, "status", "--porcelain", "--untracked-files=normal", "--", ".")
      return f"{commit}, changed" if changes else commit
  except (OSError, subprocess.SubprocessError):
    pass
  return f"version {vixml_jax.__version__}, no checkout"


def _git(folder: Path, *arguments: str) -> str:
  """Returns what a git command prints; variables that name another repository are ignored."""
  environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
  done = subprocess.run(  # nosec B603 B607 - git of the user's PATH, with arguments of this module; no shell.
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
