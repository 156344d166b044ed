"""Prints the share of the lines of each room that the tests run, from the data of the last `make coverage`.

  make coverage

A room is a folder of `vixml_jax/`, or its modules outside of folders ("entry points and helpers"). The modules with the
lowest shares are listed below the table.
"""

import collections
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vixml_jax"
TOP = "entry points and helpers"
SHOWN = 10  # Modules that are listed.


def lines_of_modules() -> dict[Path, tuple[int, int]]:
  """Returns the number of lines that can run and that ran, by module of the package."""
  data = coverage.Coverage(data_file=str(ROOT / ".coverage"), config_file=str(ROOT / "pyproject.toml"))
  data.load()
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    _, lines, _, missing, _ = data.analysis2(str(path))
    found[path.relative_to(PACKAGE)] = len(lines), len(lines) - len(missing)
  return found


def share(lines: int, ran: int) -> float:
  """Returns the share in percent; 100 for a module without lines that can run."""
  return 100 * ran / lines if lines else 100.0


def main() -> None:
  """Prints the table."""
  modules = lines_of_modules()
  rooms: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  for path, counts in modules.items():
    for name in (path.parts[0] if len(path.parts) > 1 else TOP, "all"):
      rooms[name] = [total + count for total, count in zip(rooms[name], counts, strict=True)]
  print(f"{'room':<26}{'lines':>8}{'run':>8}{'share':>9}")
  for name in [*sorted(rooms.keys() - {"all"}), "all"]:
    lines, ran = rooms[name]
    print(f"{name:<26}{lines:>8}{ran:>8}{share(lines, ran):>8.1f}%")
  lowest = sorted(modules, key=lambda path: share(*modules[path]))[:SHOWN]
  print("\nmodules with the lowest shares:")
  for path in lowest:
    print(f"  {share(*modules[path]):5.1f}%  {path}")


if __name__ == "__main__":
  main()
