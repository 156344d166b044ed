"""Writes the tables of flags in docs/commands.md, from the flags of the commands and their help texts.

python -m tools.flag_tables
"""

from collections.abc import Iterable
from pathlib import Path
import re

from absl import flags

from vixml_jax import cli, command_help, completion
from vixml_jax.__main__ import MODULES

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
_HEAD = "| flag | default | purpose |\n|---|---|---|\n"


def with_tables(page: str) -> str:
  """Returns the page with the table of each command, and of the flags of every command, as they are now.

  Args:
    page: Text of the page. The section of a command is called `vixml NAME`, and contains a table.
  """
  assert cli.__name__ == "vixml_jax.cli"  # Its flags are those of every command.
  tables = {f"vixml {name}": _table(completion.read_flags(module)) for name, module in MODULES.items()}
  tables["Flags of every command"] = _table(command_help.flags_of_all())
  for section, table in tables.items():
    pattern = rf"(^## {re.escape(section)}\n(?:(?!^## ).*\n)*?){re.escape(_HEAD)}(?:\|.*\n)*"
    page, count = re.subn(pattern, lambda match, table=table: match[1] + table, page, flags=re.MULTILINE)
    if count != 1:
      raise ValueError(f"{PAGE}: has no section {section!r} with a table; write one")
  return page


def _table(found: Iterable[flags.Flag]) -> str:
  return _HEAD + "".join(map(_row, found))


def _row(flag: flags.Flag) -> str:
  name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
  default = "" if flag.default is None else f"`{(flag.default_as_str or '')[1:-1]}`"
  purpose = re.sub(r"^<(.*?)>: ", lambda match: f"`{match[1]}`: ", " ".join(flag.help.split())).replace("|", r"\|")
  return f"| `{name}` | {default} | {purpose} |\n"


if __name__ == "__main__":
  PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
