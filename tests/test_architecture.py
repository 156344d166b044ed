"""Checks of the whole repository: direction of imports, forbidden imports, sizes, names."""

import ast
import collections
import json
from pathlib import Path
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest

from tests.helpers.miniature_runs import run_commands
import vixml_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vixml_jax"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
ENTRY_POINTS = sorted(path.stem for path in PACKAGE.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8"))
LIBRARY = sorted(
  {module.name for module in pkgutil.walk_packages(vixml_jax.__path__, prefix="vixml_jax.")}
  - {f"vixml_jax.{name}" for name in ENTRY_POINTS}
)
MOST_LINES = 350

# Imports the modules of the library, then each entry point in a fork, since each defines the flags of its own process.
# Prints which hidden packages were imported. torch must be hidden: transformers and tensorboardX import it by
# themselves where it is installed, which would look like an import of ours.
IMPORT_ALL = """
import importlib, importlib.machinery, json, os, sys, warnings
HIDDEN = {"torch", "tensorflow", "scann", "configs", "napkinxc"}
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.split(".")[0] in HIDDEN else find_spec(name, path, target))

def import_all(names):
  for name in names:
    importlib.import_module(name)
  found = sorted(HIDDEN & {name.split(".")[0] for name in sys.modules})
  if found:
    print(*names, "imported", *found, flush=True)

library, entry_points = json.loads(sys.argv[1])
import_all(library)
for name in entry_points:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Threads of the imported libraries do not matter to an import.
    child = os.fork()
  if not child:
    status = 1
    try:
      import_all([name])
      status = 0
    except BaseException:
      sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(status)
  if os.waitpid(child, 0)[1]:
    sys.exit(f"{name}: see above")
"""


def _run(*command, cwd=ROOT):
  return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)


def _text_files():
  """The text files that git tracks or would track."""
  listed = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
  if listed.returncode:
    pytest.skip("not a git checkout, so the files of a commit are unknown")
  for name in filter(None, listed.stdout.split("\0")):
    content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
    if b"\0" not in content[:4096]:
      yield name, content.decode("utf-8")


# Imports.


def test_imports_go_one_way():
  result = _run(Path(sys.executable).parent / "lint-imports", "--no-cache")
  assert result.returncode == 0, result.stdout + result.stderr


def test_design_shows_the_layers_of_the_import_contract():
  (layers,) = (contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")
  page = (ROOT / "docs" / "design.md").read_text("utf-8")
  (shown,) = re.findall(r"compares this list.*?-->\n```text\n(.*?)```", page, re.DOTALL)
  assert [line.removeprefix("->").strip() for line in shown.splitlines()] == layers


def test_design_shows_the_arrows_between_packages():
  (layers,) = (contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")
  helpers = {*re.findall(r"\w+", layers[-1]), "__init__"}
  arrows = collections.defaultdict(set)
  for path, tree in TREES.items():
    package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    imported = {name.split(".")[1] for name in _imported_modules(tree)} - helpers - {package}
    if imported and package not in helpers:
      arrows[package] |= imported
  page = (ROOT / "docs" / "design.md").read_text("utf-8")
  (shown,) = re.findall(r"compares these arrows.*?-->\n```text\n(.*?)```", page, re.DOTALL)
  drawn = dict(line.split(" -> ") for line in shown.splitlines())
  assert {package: set(targets.split(", ")) for package, targets in drawn.items()} == arrows


def _imported_modules(tree):
  """The modules of this package that a module imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module == "vixml_jax":
      yield from (f"vixml_jax.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vixml_jax."):
      yield node.module


def test_design_maps_every_room():
  page = (ROOT / "docs" / "design.md").read_text("utf-8")
  rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
  modules = {path.stem for path in PACKAGE.glob("[a-z]*.py")} - set(ENTRY_POINTS)
  mapped = set(re.findall(r"`([a-z_]+)/?`", "".join(re.findall(r"^\|(.*?)\|", page, re.MULTILINE))))
  assert rooms | modules <= mapped, "docs/design.md, The map: rooms without a row"
  assert mapped <= rooms | modules | set(ENTRY_POINTS), "docs/design.md, The map: rows without a room"


def test_every_module_imports_where_torch_tensorflow_and_scann_are_absent():
  names = [LIBRARY, [f"vixml_jax.{name}" for name in ENTRY_POINTS]]
  result = _run(sys.executable, "-W", "error", "-c", IMPORT_ALL, json.dumps(names))
  assert result.returncode == 0, result.stderr
  assert result.stdout == ""
  assert result.stderr == "", "every command would print what an import prints"


def test_nothing_unpickles_or_trusts_foreign_code():
  modules, arguments = {"pickle", "marshal", "shelve"}, {"allow_pickle", "trust_remote_code"}
  found = []
  for path, tree in TREES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        wrong = {alias.name.split(".")[0] for alias in node.names} & modules
      elif isinstance(node, ast.ImportFrom):
        wrong = {(node.module or "").split(".")[0]} & modules
      elif isinstance(node, ast.keyword) and node.arg in arguments:
        wrong = not (isinstance(node.value, ast.Constant) and node.value.value is False)
      else:
        wrong = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}
      if wrong:
        found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', node)}")
  assert not found


# Sizes and names.


def test_a_module_that_is_long_gives_the_reason():
  long = {path: tree for path, tree in TREES.items() if len(path.read_text("utf-8").splitlines()) > MOST_LINES}
  silent = [
    str(path.relative_to(ROOT))
    for path, tree in long.items()
    if not re.search(r"\blong\b.*\b(because|since|so that)\b", ast.get_docstring(tree), re.DOTALL)
  ]
  assert not silent, f"over {MOST_LINES} lines: split it, or say in its docstring 'The module is long because ...'"


def test_no_two_classes_share_a_name():
  places = collections.defaultdict(list)
  for path, tree in TREES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.ClassDef):
        places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
  assert not {name: where for name, where in places.items() if len(where) > 1}


def test_no_file_names_a_path_of_somebodys_machine():
  machine = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|farm)/\w")
  found = [
    f"{name}:{number}: {line.strip()}"
    for name, text in _text_files()
    for number, line in enumerate(text.splitlines(), 1)
    if machine.search(line)
  ]
  assert not found


def test_the_version_is_the_same_everywhere():
  version = vixml_jax.__version__
  assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
  assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text("utf-8")
  assert "\nversion = attr: vixml_jax.__version__\n" in (ROOT / "setup.cfg").read_text("utf-8")


# Entry points.


@pytest.fixture(scope="module")
def help_pages(tmp_path_factory):
  """Entry point -> exit status, stdout and stderr of `--help`."""
  return run_commands({name: [name, "--help"] for name in ENTRY_POINTS}, tmp_path_factory.mktemp("help"))


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_point_answers_help(name, help_pages):
  status, stdout, stderr = help_pages[name]
  assert status == 0, stdout + stderr
  assert "--" in stdout and len(stdout.splitlines()) > 3
  assert stderr == ""
