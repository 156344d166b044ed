"""The command `vixml`, which is also `python -m vixml_jax`: starts an entry point by its short name.

vixml train --config=quickstart
vixml --help
vixml COMMAND --help
"""

import ast
from collections.abc import Callable
import difflib
from pathlib import Path
import runpy
import sys

import vixml_jax
from vixml_jax import command_help, completion

MODULES = {
  "train": "main",
  "predict": "predict",
  "encode": "encode",
  "serve": "serve",
  "evaluate": "evaluate",
  "add-labels": "add_labels",
  "export": "export",
  "prepare": "prepare_data",
  "features": "extract_features",
  "study": "study",
  "compile": "aot_compile",
  "describe": "describe",
}
"""Short name -> module of the entry point; `vixml NAME` is the same as `python -m vixml_jax.MODULE`."""


def main() -> None:
  """Runs the command of the command line; commands exit with their own status."""
  name, *arguments = sys.argv[1:] or ["--help"]
  own: dict[str, Callable[[list[str]], str]] = {
    "--help": lambda _: _overview(),
    "-h": lambda _: _overview(),
    "--version": lambda _: f"vixml {vixml_jax.__version__}",
    "completion": _completion,
  }
  if name in MODULES:
    # The entry point runs as `python -m` runs it, so that both are the same command.
    sys.argv = [f"vixml {name}", *arguments]
    runpy.run_module(f"vixml_jax.{MODULES[name]}", run_name="__main__", alter_sys=True)
  elif name in own:
    command_help.show(own[name](arguments))
  else:
    near = difflib.get_close_matches(name, [*MODULES, *own], 1)
    _fail(f"{name}: unknown command; " + (f"did you mean {near[0]}?" if near else "see vixml --help"))


def _overview() -> str:
  """Returns what `--help` prints: each command with the first line of its module's docstring."""
  summaries = {name: _summary(module) for name, module in MODULES.items()}
  summaries["completion"] = "Prints the completion of commands and flags for bash or zsh."
  lines = [f"  {name:<12}{summary}" for name, summary in summaries.items()]
  return "\n".join(
    [
      vixml_jax.__doc__.splitlines()[0],
      "",
      "  vixml COMMAND [--FLAG=VALUE ...]",
      "  vixml COMMAND --help     shows the flags of a command",
      "  vixml --version",
      "",
      *lines,
    ]
  )


def _summary(module: str) -> str:
  """Returns the first line of a module's docstring, without importing it."""
  source = Path(__file__).with_name(f"{module}.py").read_text("utf-8")
  return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _completion(arguments: list[str]) -> str:
  if len(arguments) != 1 or arguments[0] not in completion.SHELLS:
    _fail(f"vixml completion: give one of {', '.join(completion.SHELLS)}, as in: . <(vixml completion bash)")
  return completion.script(arguments[0], MODULES)


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)


if __name__ == "__main__":
  main()
  sys.exit(0)
