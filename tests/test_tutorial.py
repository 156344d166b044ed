"""The commands of docs/tutorial.md run in their order in an empty folder, and print what the page shows."""

import os
from pathlib import Path
import re
import socket
import subprocess
import sys

import pytest

from tests.helpers.documents import ROOT, Document

PAGE = Document.read(ROOT / "docs" / "tutorial.md")
_NUMBER = r"-?\d[\d.,]*(?:e-?\d+)?"


def _free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def _environment(folder: Path) -> dict[str, str]:
  """Returns variables with which `vixml` and `python` are those of this checkout."""
  programs = folder / "programs"
  programs.mkdir()
  for name, arguments in {"vixml": "-m vixml_jax ", "python": ""}.items():
    (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
    (programs / name).chmod(0o755)
  fast = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "PYTHONWARNINGS": "ignore"}
  return os.environ | fast | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def _shown(text: str) -> list[str]:
  """Returns the parts of an output that do not depend on the machine: without numbers, and without what `...` left out.

  Spaces are joined, because the width of a column depends on its numbers.
  """
  parts = [part for line in text.splitlines() for part in line.split("...")]
  joined = (" ".join(re.sub(_NUMBER, "0", part).split()) for part in parts)
  return [part for part in joined if part]


def _missing(shown: str, printed: str) -> list[str]:
  found = "\n".join(_shown(printed))
  return [part for part in _shown(shown) if part not in found]


@pytest.mark.slow
def test_the_commands_run_and_print_what_is_shown(tmp_path):
  folder, port = tmp_path / "empty", str(_free_port())
  folder.mkdir()
  environment, printed, ran = _environment(tmp_path), "", 0
  for block in PAGE.blocks:
    where = PAGE.at(block.line)
    if block.code.startswith("pip install"):
      continue  # What runs is this checkout.
    if block.language in ("bash", "python"):
      code = block.code.replace("8080", port)
      command = ["bash", "-euo", "pipefail", "-c", code] if block.language == "bash" else [sys.executable, "-c", code]
      done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
      assert done.returncode == 0, f"{where}: {done.stderr}"
      printed, ran = done.stdout + done.stderr, ran + 1
    else:
      assert _missing(block.code, printed) == [], f"{where}\n{printed}"
  assert ran >= 8


@pytest.mark.parametrize(("printed", "missing"), [("P@1 is 71.5\nmore", []), ("R@1 is 70", ["P@0 is 0"])])
def test_another_output_is_noticed_and_another_number_is_not(printed, missing):
  assert _missing("...\nP@1 is 70.0\n", printed) == missing
