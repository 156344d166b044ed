"""What holds for the repository as a whole: directions of imports, what is not imported, what is shipped."""

import ast
from pathlib import Path
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import zipfile

import pytest

import vixml_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vixml_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ENTRY_POINTS = sorted(path.stem for path in PACKAGE.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8"))
MODULES = sorted(
  {module.name for module in pkgutil.walk_packages(vixml_jax.__path__, prefix="vixml_jax.")}
  - {f"vixml_jax.{name}" for name in ENTRY_POINTS}
)

# Imports every module where torch, TensorFlow and ScaNN are not installed, and prints which of what must not be
# imported is there. transformers and tensorboardX import torch by themselves where they find it, so hiding it is the
# only way to tell their import from one of ours.
IMPORT_ALL = """
import importlib, importlib.machinery, sys
HIDDEN = {"torch", "tensorflow", "scann", "configs", "napkinxc"}
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.split(".")[0] in HIDDEN else find_spec(name, path, target))
for name in sys.argv[1:]:
  importlib.import_module(name)
print(sorted(HIDDEN & {name.split(".")[0] for name in sys.modules}))
"""


def _run(*command, cwd=ROOT):
  return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)


def _text_files():
  """The files that git tracks or would track, and that are text."""
  listed = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
  if listed.returncode:
    pytest.skip("no git checkout: the files that a commit would hold are not known")
  for name in filter(None, listed.stdout.split("\0")):
    content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
    if b"\0" not in content[:4096]:
      yield name, content.decode("utf-8")


def test_imports_go_one_way():
  result = _run(Path(sys.executable).parent / "lint-imports", "--no-cache")
  assert result.returncode == 0, result.stdout + result.stderr


# Entry points one by one: each defines the flags of its own process.
@pytest.mark.parametrize(
  "modules", [MODULES] + [[f"vixml_jax.{name}"] for name in ENTRY_POINTS], ids=["library", *ENTRY_POINTS]
)
def test_every_module_imports_where_torch_tensorflow_and_scann_are_absent(modules):
  result = _run(sys.executable, "-W", "error", "-c", IMPORT_ALL, *modules)
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines()[-1] == "[]"
  assert result.stderr == "", "what an import prints, every command would print"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unpickles_or_trusts_foreign_code(path):
  refused = {"allow_pickle", "trust_remote_code"}
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      assert not {alias.name.split(".")[0] for alias in node.names} & {"pickle", "marshal", "shelve"}
    elif isinstance(node, ast.ImportFrom):
      assert (node.module or "").split(".")[0] not in {"pickle", "marshal", "shelve"}
    elif isinstance(node, ast.keyword) and node.arg in refused:
      value = node.value.value if isinstance(node.value, ast.Constant) else None
      assert value is False, f"line {node.value.lineno}: {node.arg}"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      assert node.func.id not in {"eval", "exec"}, f"line {node.lineno}: {node.func.id}"


def test_every_module_says_what_it_does():
  silent = [path for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
  assert not silent


def test_no_file_names_a_path_of_somebodys_machine():
  machine = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|farm)/\w")
  found = [
    f"{name}:{number}: {line.strip()}"
    for name, text in _text_files()
    for number, line in enumerate(text.splitlines(), 1)
    if machine.search(line)
  ]
  assert not found


def test_entry_points_exist():
  assert {"main", "prepare_data", "extract_features", "evaluate"} <= set(ENTRY_POINTS)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_point_answers_help(name):
  result = _run(sys.executable, "-m", f"vixml_jax.{name}", "--help")
  assert result.returncode == 0, result.stdout + result.stderr
  assert "--" in result.stdout and len(result.stdout.splitlines()) > 3
  assert result.stderr == ""


def test_wheel_carries_the_package_and_its_data_and_nothing_else(tmp_path):
  # A copy, since building leaves folders behind.
  source = tmp_path / "source"
  source.mkdir()
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  shutil.copytree(PACKAGE, source / "vixml_jax", ignore=shutil.ignore_patterns("__pycache__"))
  result = _run(
    sys.executable,
    "-m",
    "pip",
    "wheel",
    "--quiet",
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
    "--disable-pip-version-check",
    "-w",
    tmp_path,
    ".",
    cwd=source,
  )
  assert result.returncode == 0, result.stderr
  (wheel,) = tmp_path.glob("*.whl")
  shipped = set(zipfile.ZipFile(wheel).namelist())
  expected = {path.relative_to(source).as_posix() for path in (source / "vixml_jax").rglob("*") if path.is_file()}
  assert {name for name in shipped if ".dist-info/" not in name} == expected
  assert {"trn.json.gz", "tst.json.gz", "lbl.json.gz"} <= {
    Path(name).name for name in shipped if "mm_icons_9k/" in name
  }


def test_network_is_blocked(network_attempts):
  with pytest.raises(OSError, match="no network"):
    socket.create_connection(("example.org", 80), timeout=1)
  with socket.socket() as unbound, pytest.raises(OSError, match="no network"):
    unbound.connect(("192.0.2.1", 80))
  assert network_attempts == ["example.org", "192.0.2.1"]
  network_attempts.clear()
