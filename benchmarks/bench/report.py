"""Writes the results of a run: lines of one Markdown table as rows end, and a JSON file with everything known."""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import os
from pathlib import Path
import platform
import re
import sys
from typing import Any

from benchmarks.bench.harness import ABSENT, RAN, RowResult, SideResult, version_of
from vixml_jax.files import new_file, write_json

_COLUMNS = {
  "row": 18,
  "side": 36,
  "speed": 20,
  "seconds: median (least to most)": 34,
  "of the limit": 12,
  "ours is": 8,
  "first call": 10,
  "same result": 0,
}
_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "numpy",
  "scipy",
  "torch",
  "transformers",
  "peft",
  "sentence-transformers",
  "onnxruntime",
  "onnx",
  "faiss-cpu",
  "scann",
  "numba",
)


def heading() -> str:
  """Returns the first two lines of the table."""
  return f"{_line(_COLUMNS)}\n|{'|'.join('-' * (width + 2) if width else '---' for width in _COLUMNS.values())}|"


def table_lines(row: RowResult) -> list[str]:
  """Returns the lines of a row, one for each side; the first one has the name of the row."""
  if row.problem:
    return [_line([row.name, row.problem])]
  ours = row.sides[0]
  return [_line([row.name if side is ours else "", *_cells(row, side, ours)]) for side in row.sides]


def _cells(row: RowResult, side: SideResult, ours: SideResult) -> list[str]:
  if side.status != RAN or side.median is None:
    return [side.name, f"{side.status}: {side.reason}"]
  rate = row.units / side.median
  ratio = "" if side is ours or ours.median is None else f"{side.median / ours.median:.2f} x"
  spread = f"{side.median:.4g} ({min(side.seconds):.4g} to {max(side.seconds):.4g})"
  share = "" if row.limit is None else f"{rate / row.limit:.1%}"
  agreement = side.check if side.same is not False else f"NO: {side.check}"
  return [side.name, f"{rate:,.4g} {row.unit}/s", spread, share, ratio, f"{side.first_seconds:.1f} s", agreement]


def _line(cells: Iterable[str]) -> str:
  cells = list(cells)
  widths = [*_COLUMNS.values()][: len(cells)]
  return f"| {' | '.join(f'{cell:{width}}' if width else cell for cell, width in zip(cells, widths, strict=True))} |"


def descriptions(rows: Iterable[RowResult], limits: Mapping[str, float]) -> list[str]:
  """Returns the lines below the table: the limits, and what each row does."""
  measured = ", ".join(f"{value:.3g} {name}" for name, value in limits.items()) or "none"
  lines = [f"Measured limits: {measured}."]
  return lines + [f"- {row.name}: {row.what}" for row in rows if row.what]


def write(
  folder: Path, rows: list[RowResult], limits: Mapping[str, float], machine: Mapping[str, Any], complete: bool
) -> None:
  """Writes `bench.txt` and `bench.json`, each as a whole or not at all."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = [heading(), *(line for row in rows for line in table_lines(row)), "", *descriptions(rows, limits)]
  with new_file(folder / "bench.txt") as work:
    work.write_text("\n".join(lines) + "\n", encoding="utf-8")
  write_json(
    folder / "bench.json",
    {**machine, "complete": complete, "limits": dict(limits), "rows": [_row_json(row) for row in rows]},
  )


def _row_json(row: RowResult) -> dict[str, Any]:
  sides = []
  for side in row.sides:
    rate = row.units / side.median if side.median else None
    share = rate / row.limit if rate and row.limit else None
    numbers = {"median": side.median, "units_per_second": rate, "share_of_limit": share}
    sides.append(dataclasses.asdict(side) | numbers)
  cost = None if row.cost is None else row.cost._asdict()
  return dataclasses.asdict(row) | {"cost": cost, "sides": sides}


def machine_facts(size: str, rounds: int, minutes: float | None) -> dict[str, Any]:
  """Returns what a reader needs to judge or repeat the run: hardware, versions, command."""
  import jax

  device = jax.devices()[0]
  return {
    "command": " ".join(["python -m benchmarks.bench", *sys.argv[1:]]),
    "size": size,
    "rounds": rounds,
    "minutes": minutes,
    "hardware": {
      "cpu": _cpu_name(),
      "cpus": len(os.sched_getaffinity(0)),
      "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
      "accelerator": device.device_kind if device.platform != "cpu" else None,
      "devices": jax.device_count(),
    },
    "versions": {"python": platform.python_version(), "system": platform.platform()}
    | {package: version_of(package) or ABSENT for package in _PACKAGES},
    "environment": {
      name: os.environ.get(name)
      for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE")
    },
  }


def summary(machine: Mapping[str, Any]) -> str:
  """Returns one line about the machine, which is printed above the table."""
  hardware, versions = machine["hardware"], machine["versions"]
  names = ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "torch", "transformers"))
  return (
    f"{hardware['cpu']}, {hardware['cpus']} CPUs, {hardware['memory_gib']} GiB, "
    f"accelerator: {hardware['accelerator'] or 'none'}; {names}; size {machine['size']}"
  )


def _cpu_name() -> str:
  path = Path("/proc/cpuinfo")
  found = re.search(r"model name\s*:\s*(.+)", path.read_text("utf-8")) if path.is_file() else None
  return found[1].strip() if found else platform.machine()


def read(folder: Path) -> dict[str, Any]:
  """Returns the contents of `bench.json` in a folder."""
  return json.loads((folder / "bench.json").read_text("utf-8"))
