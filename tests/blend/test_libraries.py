"""The libraries of the blend can be imported in every command."""

import subprocess
import sys

from tests.helpers.documents import ROOT

_COMMAND = """
from vixml_jax import cli
from vixml_jax.blend.libraries import check_blend_libraries
cli.run(check_blend_libraries)
"""


def test_commands_import_them():
  done = subprocess.run([sys.executable, "-c", _COMMAND], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")
