"""What documents may name: config keys, flags, entry points, targets of the Makefile, names of the package."""

import ast
from collections.abc import Set
import functools
from pathlib import Path
import re

from ml_collections import ConfigDict

from configs.common import base_config
from configs.encoders import ENCODERS
from tests.helpers.documents import ROOT
from vixml_jax.run import named_configs

PACKAGE = ROOT / "vixml_jax"
PROGRAMS = frozenset(
  {".", "apt-get", "cat", "cd", "curl", "docker", "echo", "export", "gcloud", "gh", "git", "head", "img2dataset", "ls"}
  | {
    "kill",
    "make",
    "mkdir",
    "mypy",
    "pip",
    "pipx",
    "pre-commit",
    "pytest",
    "python",
    "rm",
    "ruff",
    "sed",
    "su",
    "tail",
    "vixml",
    "vixml completion",
    "wait",
  }
  | {"kubectl", "xpk"}
)
"""Programs of others that a page may call."""
MODULES = frozenset({"pip", "pytest", "mypy", "venv", "doctest", "ruff"})
"""Modules of others that a page may run with `python -m`."""
FLAGS_OF_OTHERS = {
  "pip": {"disable-pip-version-check", "exclude-editable", "no-build-isolation", "no-deps", "upgrade"},
  "pytest": {"collect-only", "durations", "maxfail"},
  "make": {"dry-run"},
  "img2dataset": {"encode_format", "resize_mode", "skip_reencode", "output_format", "save_additional_columns"},
  "xpk": {"restart-on-exit-codes"},
  "sbatch": {"signal"},
}
"""Flags of others that a page may name without their program."""


@functools.cache
def entry_points() -> dict[str, Path]:
  """Returns the modules that `python -m` runs, with their files."""
  found = {}
  for folder in ("vixml_jax", "benchmarks"):
    for path in sorted((ROOT / folder).glob("*.py")):
      if '__name__ == "__main__"' in path.read_text("utf-8"):
        found[folder if path.stem == "__main__" else f"{folder}.{path.stem}"] = path
    for path in sorted((ROOT / folder).glob("*/__main__.py")):
      found[f"{folder}.{path.parent.name}"] = path
  return found


@functools.cache
def config_keys() -> frozenset[str]:
  """Returns every key of the configs, and every section, as `section.key`."""
  keys = keys_of(base_config())
  for encoder in ENCODERS.values():
    keys |= {f"encoder.{key}" for key in encoder}
  return frozenset(keys)


def keys_of(config: ConfigDict, prefix: str = "") -> set[str]:
  keys = set()
  for key, value in config.items():
    keys.add(prefix + key)
    if isinstance(value, ConfigDict):
      keys |= keys_of(value, f"{prefix}{key}.")
  return keys


@functools.cache
def flags_of(path: Path) -> frozenset[str]:
  """Returns the flags of a Python file (absl and argparse) or of a launch script, without dashes in front."""
  source = path.read_text("utf-8")
  if path.suffix != ".py":
    lists = re.findall(r'value_flags="([^"]*)"', source) + re.findall(r'parse_flags "[^"]*" "([^"]*)"', source)
    words = " ".join(lists)
    return frozenset({*words.split(), *re.findall(r"--([a-z_]+)=\*", source), "help", "dry_run"})
  return frozenset({"help", "helpfull"} | _flags_in(path, None))


def _flags_in(path: Path, called: Set[str] | None) -> set[str]:
  """Returns the flags of a Python file, of modules that it imports, and of their functions that it calls.

  Args:
    path: The file.
    called: The functions of the file that count; None for all.
  """
  tree = ast.parse(path.read_text("utf-8"))
  parts = [part for part in tree.body if called is None or not isinstance(part, ast.FunctionDef) or part.name in called]
  source = "\n".join(ast.unparse(part) for part in parts)
  flags = set[str]().union(*(_defined_flags(part) for part in parts))
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module == "vixml_jax":
      for name in (alias.name for alias in node.names):
        if (PACKAGE / f"{name}.py").is_file():
          flags |= _flags_in(PACKAGE / f"{name}.py", set(re.findall(rf"\b{name}\.(\w+)\(", source)))
  return flags


def _defined_flags(tree: ast.AST) -> set[str]:
  flags = set[str]()
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
      continue
    names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if node.func.attr.startswith("DEFINE_") and names:
      flags |= {names[0], f"no{names[0]}"} if node.func.attr == "DEFINE_bool" else {names[0]}
    elif node.func.attr == "add_argument":
      long = {name.removeprefix("--") for name in names if name.startswith("--")}
      flags |= long | {f"no-{name}" for name in long}
  return flags


def flags_of_program(program: str) -> frozenset[str] | None:
  """Returns the flags of a program of the repository; None for a program of others."""
  if program in entry_points():
    return flags_of(entry_points()[program])
  path = ROOT / program
  return flags_of(path) if "/" in program and path.suffix in (".py", ".sh", ".sbatch") and path.is_file() else None


@functools.cache
def all_flags() -> frozenset[str]:
  """Returns the flags of all commands and scripts of the repository, and those of others that pages may name."""
  programs = [*entry_points(), *(f"launch/{path.name}" for path in ROOT.glob("launch/*.sh"))]
  programs += [f"tools/{path.name}" for path in ROOT.glob("tools/*.py")]
  ours = frozenset[str]().union(*(flags_of_program(program) or () for program in programs))
  return ours.union(*FLAGS_OF_OTHERS.values())


@functools.cache
def make_words() -> tuple[frozenset[str], frozenset[str]]:
  """Returns the targets and the variables of the Makefile."""
  source = (ROOT / "Makefile").read_text("utf-8")
  targets = re.search(r"^\.PHONY: (.*)$", source, re.MULTILINE)
  assert targets is not None
  return frozenset(targets[1].split()), frozenset(re.findall(r"^([A-Z_]+) *[?:]?=", source, re.MULTILINE))


@functools.cache
def sources() -> str:
  """Returns the text of all code, in which the name of every output file occurs."""
  folders = ("vixml_jax", "configs", "launch", "benchmarks", "tools", "tests")
  paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
  paths = [path for path in paths if path.suffix in (".py", ".sh", ".sbatch", ".html")]
  paths.remove(ROOT / "tests" / "test_documents.py")  # Which has names that do not exist.
  names = [path.name for path in (PACKAGE / "datasets" / "mm_icons_9k").iterdir()]
  return "\n".join([*(path.read_text("utf-8") for path in paths), *names, (ROOT / "Makefile").read_text("utf-8")])


@functools.cache
def load_config(argument: str) -> ConfigDict:
  """Returns the config of `--config=ARGUMENT`, a name or a file, with its variant.

  Raises:
    ValueError: No such file, or no such variant.
  """
  return named_configs.load(f"{ROOT}/{argument}" if "/" in argument else argument)


def is_name(dotted: str) -> bool:
  """Whether the package has a module, class, function or attribute `vixml_jax.DOTTED`."""
  parts = dotted.split(".")
  path = PACKAGE
  while parts and (path / parts[0]).is_dir():
    path, parts = path / parts[0], parts[1:]
  if parts and (path / f"{parts[0]}.py").is_file():
    path, parts = path / f"{parts[0]}.py", parts[1:]
  if not parts:
    return True
  source = (path if path.suffix else path / "__init__.py").read_text("utf-8")
  imported = re.search(rf"(?m)^\s*from vixml_jax\.([\w.]+) import [^\n]*\b{parts[0]}\b", source)
  if imported and len(parts) > 1:  # A method of a class that the package offers.
    return is_name(".".join([imported[1], *parts]))
  defined = r"(?m)^\s*(?:def|class) {0}\b|^\s*{0}\b[^=\n]*=|import .*\b{0}\b|^  {0},$|['\"]{0}['\"]"
  return all(re.search(defined.replace("{0}", re.escape(part)), source) for part in parts)
