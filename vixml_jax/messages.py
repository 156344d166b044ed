"""What commands print on stderr: plain log lines of this package, and warnings of libraries without their chatter.

This is the only place that silences a library. `set_up` must be called before JAX is imported.
"""

import importlib.util
import logging
import os
from pathlib import Path
import sys

# Files that exist where a TPU or a GPU is attached: those of TPUs (the second since v5e), NVIDIA, WSL, AMD.
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia*", "dxg", "kfd")
# Variables with which a user chooses devices; then nothing is chosen here.
_CHOICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH")

_log = logging.getLogger(__name__)


def set_up() -> None:
  """Logs plain lines on stderr: messages of this package from INFO on, those of libraries from WARNING on."""
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  if sys.stderr.isatty():  # Progress bars show the same.
    handler.addFilter(lambda record: record.name != "vixml_jax.progress_lines")
  root = logging.getLogger()
  root.handlers[:] = [handler]
  root.setLevel(logging.WARNING)
  logging.getLogger("vixml_jax").setLevel(logging.INFO)
  # Orbax logs errors with a traceback before it raises them, and the exception is what users see.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  # When a checkpoint is damaged, Orbax abandons its other reads, and asyncio would log each of them.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  # When the disk is full, Orbax abandons its other writes, and each would be logged when TensorStore ends it.
  logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)
  _do_not_look_for_absent_tpus()


def _do_not_look_for_absent_tpus() -> None:
  """Tells JAX to use the CPU where libtpu is installed and no accelerator is attached.

  libtpu would look for a TPU, and print paragraphs of errors when it finds none.
  """
  if any(name in os.environ for name in _CHOICES) or importlib.util.find_spec("libtpu") is None:
    return
  if not any(True for pattern in _ACCELERATORS for _ in Path("/dev").glob(pattern)):
    os.environ["JAX_PLATFORMS"] = "cpu"
    _log.info("libtpu is installed, but no TPU is attached: using the CPU; JAX_PLATFORMS overrides this")
