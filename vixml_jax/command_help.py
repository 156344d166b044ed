"""The flags of a command, and the text of its `--help`: what it does, and its flags with their defaults."""

from collections.abc import Sequence
import itertools
import signal
import sys

from absl import flags

_HELP = ("--help", "-help", "-h", "-?", "--helpshort", "-helpshort")
_FLAGS_OF_ALL = "vixml_jax.cli"


def is_wanted(argv: Sequence[str]) -> bool:
  """Returns whether a command line asks for help."""
  return any(argument in _HELP for argument in itertools.takewhile(lambda argument: argument != "--", argv[1:]))


def flags_of(module: str) -> list[flags.Flag]:
  """Returns the flags that an entry point defines, in the order of their definition; those of `cli` are left out.

  Args:
    module: Name of the imported module, such as `vixml_jax.predict`; `__main__` for the one that runs.
  """
  return flags.FLAGS.get_key_flags_for_module(sys.argv[0] if module == "__main__" else module)


def flags_of_all() -> list[flags.Flag]:
  """Returns the flags that every command has: those of runs in several processes."""
  return flags.FLAGS.get_key_flags_for_module(_FLAGS_OF_ALL)


def show(text: str) -> None:
  """Prints a text on stdout; a reader that stops early, such as `head`, ends the process without an error."""
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  print(text)


def text(module: str) -> str:
  """Returns the text of `--help` of an entry point, which `flags_of` names."""
  parts = [(sys.modules[module].__doc__ or "").strip(), "", "Flags:", *map(_described, flags_of(module))]
  return "\n".join([*parts, "", "Flags of runs in several processes:", *map(_described, flags_of_all())])


def _described(flag: flags.Flag) -> str:
  """Returns the lines of a flag: its name and its help as it is, what a value must be, and the default."""
  name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
  notes = [flag.parser.syntactic_help] if flag.parser.syntactic_help else []
  if flag.default is not None:
    notes.append(f"default: {(flag.default_as_str or '')[1:-1]}")  # Without the quotes of absl.
  lines = [flags.text_wrap(f"{name}: {flag.help}", indent="    ", firstline_indent="  ")]
  return "\n".join([*lines, f"    ({'; '.join(notes)})"] if notes else lines)
