"""Shows how time and memory grow with labels, batch and devices: tables, JSON and plots.

  python -m benchmarks.cost_growth [--parts=labels,search,batch,devices,virtual] [--size=full] [--output=DIR]
      [--plots=DIR]

`labels`, `batch` and `devices` compile the programs of LF-AmazonTitles-1.3M with DistilBERT for TPUs that need not
exist, as `vixml_jax.aot_compile` does. They need its compiler (pip install -c constraints.txt -e '.[tpu]'); without it
they are left out with one line, and the exit status is 1. `search` and `virtual` measure on this machine. Each part
replaces its rows in `cost_growth.json` and its plot, so that parts can be run one at a time.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import json
from pathlib import Path
import re
import runpy
import statistics
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.bench.data import unit_vectors
from benchmarks.bench.report import machine_facts
from benchmarks.log_charts import Panel, log_chart
from vixml_jax import sharding
from vixml_jax.ahead_of_time.compiling import compile_program
from vixml_jax.ahead_of_time.estimate import Compiler, compile_train_step, estimate_train_step
from vixml_jax.ahead_of_time.machine import GIB, Chip, Machine, Torus
from vixml_jax.ahead_of_time.plan import MeshPlan, Plan, mesh_plan_of, workload_on
from vixml_jax.ahead_of_time.programs import run_programs
from vixml_jax.ahead_of_time.roofline import Roofline
from vixml_jax.ahead_of_time.sizes import DataSize, data_size
from vixml_jax.ahead_of_time.topology import machine_of
from vixml_jax.errors import InputError
from vixml_jax.files import new_file, write_json
from vixml_jax.run.state import create_state, init_params
from vixml_jax.search.exact import ExactIndex
from vixml_jax.training.optimizer import optimizer_from_config
from vixml_jax.training.step import device_batch, make_train_step, step_config

Row = dict[str, Any]

VIRTUAL_DEVICES = 8
"""Number of virtual CPU devices that the part `virtual` needs."""
TINY_MODEL = {
  "encoder.vocab_size": 1024,
  "encoder.num_layers": 2,
  "encoder.embed_dim": 128,
  "encoder.num_heads": 8,
  "encoder.mlp_dim": 512,
  "encoder.dtype": "float32",
  "prototype.mlp_dim": 128,
  "train.bank_dtype": "float32",
  "train.free_vectors": 1024,
}
"""Keys of a small model, which CPUs train in a moment."""
_CONFIG = Path(__file__).parents[1] / "configs" / "lf_amazon_1.3m.py"
# Programs whose cost depends on the number of labels, by the name of their first part in `run_programs`.
_OF_LABELS = {
  "search, 512 queries": "search labels",
  "centroids": "label centroids at the end",
  "prototypes": "prototypes",
}
_TOPOLOGY = "v5e:4x4"
_ROUNDS = 5
# The rates are not used: only memory and the measured time are reported.
_VIRTUAL_CHIP = Chip(4 * GIB, flops=1.0, hbm_bandwidth=1.0, product_cost={}, overlaps=True, efficiency=1.0)


@dataclasses.dataclass(frozen=True)
class Size:
  """What a run varies.

  Attributes:
    labels: Numbers of labels of the compiled programs; so are `batches` and `topologies`.
    searched: Numbers of labels that are searched on this machine, ascending.
    dim: Dimensions of these labels.
    queries: Number of queries.
    virtual: Numbers of virtual devices.
    batch: Number of queries of the step on virtual devices.
  """

  labels: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
  batches: tuple[int, ...] = (256, 1024, 4096)
  topologies: tuple[str, ...] = ("v5e:4x4", "v5e:8x8", "v5e:16x16")
  searched: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
  dim: int = 384
  queries: int = 512
  virtual: tuple[int, ...] = (1, 2, 4, 8)
  batch: int = 256


SIZES = {
  "full": Size(),
  "tiny": Size((1000, 2000), (64,), ("v5e:2x2",), (500, 2000), dim=16, queries=16, virtual=(1, 2), batch=16),
}


def full_config(changes: dict[str, Any] | None = None) -> ConfigDict:
  """Returns the config of LF-AmazonTitles-1.3M with DistilBERT, text only, with other values of some keys."""
  config = runpy.run_path(str(_CONFIG))["get_config"]("encoder=distilbert")
  config.update_from_flattened_dict(changes or {})
  return config


def plan_on(where: Machine, config: ConfigDict, labels: int | None = None) -> Plan:
  """Returns the plan of a config on a machine; by default with the published number of labels."""
  workload = workload_on(config, data_size(config, num_labels=labels), where)
  return Plan.of(workload, where, mesh_plan_of(workload.config, where))


def label_rows(where: Machine, config: ConfigDict, counts: tuple[int, ...], compiler: Compiler) -> Iterator[Row]:
  """Yields the cost of the programs that depend on the number of labels.

  A search is of one chunk of queries; centroids and prototypes are those of all labels. Memory contains all arrays that
  a chip holds while the program runs, such as the embeddings of the training queries.
  """
  for labels in counts:
    plan = plan_on(where, config, labels)
    programs = run_programs(plan)
    for name, start in _OF_LABELS.items():
      parts = [program for program in programs if program.name.partition(": ")[0] == start]
      lower_bound, expected, memory = 0.0, 0.0, 0.0
      for program in parts:
        compiled = compiler(plan, program, ())
        if compiled.cost is None:
          raise InputError(f"{compiled.name} with {labels:,} labels does not fit {where.name}; use fewer labels")
        roofline, times = Roofline.of(compiled.cost, where), 1 if start.startswith("search") else program.runs
        lower_bound, expected = lower_bound + times * roofline.lower_bound, expected + times * roofline.expected
        memory = max(memory, compiled.memory.total)
      yield {
        "labels": labels,
        "program": name,
        "lower_bound_ms": 1000 * lower_bound,
        "expected_ms": 1000 * expected,
        "gib_a_chip": memory / GIB,
      }


def step_row(plan: Plan, compiler: Compiler) -> Row:
  """Returns the cost of a plan's compiled training step."""
  where, mesh = plan.where, plan.mesh_plan
  estimate = estimate_train_step(plan, compile_train_step(plan, compiler))
  roofline, memory = estimate.roofline, estimate.program.memory
  if roofline is None:
    raise InputError(f"the training step on {where.name} needs {memory.total / GIB:.2f} GiB of a chip; use more chips")
  return {
    "batch": plan.workload.config.train.batch_size,
    "chips": len(where.devices),
    "mesh": f"{mesh.data} x {mesh.fsdp} x {mesh.tensor}",
    "chunk_rows": mesh.chunk_rows,
    "lower_bound_ms": 1000 * roofline.lower_bound,
    "expected_ms": 1000 * roofline.expected,
    "links_ms": 1000 * roofline.interconnect,
    "percent_of_peak": 100 * estimate.utilization(where, roofline.expected),
    "percent_links": 100 * roofline.interconnect / roofline.expected,
    "gib_a_chip": memory.total / GIB,
  }


def search_rows(size: Size) -> Iterator[Row]:
  """Yields the measured cost of exact search in float32, top 100; sizes that do not fit the memory are left out."""
  asked = unit_vectors(size.queries, size.dim, size.searched[0], seed=2)
  for labels in size.searched:
    vectors, free = 4 * labels * size.dim / GIB, _gib("/proc/meminfo", "MemAvailable")
    if 2.5 * vectors > free:  # The labels on the host, a copy on the device, and the scores of a block.
      print(f"{labels:,} labels are left out: {2.5 * vectors:.1f} GiB are needed and {free:.1f} are free", flush=True)
      continue
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Counts the peak anew.
    index = ExactIndex(
      unit_vectors(labels, size.dim, size.searched[0], seed=1), sharding.make_mesh(devices=jax.devices()[:1])
    )
    index.search(asked, 100)
    times = []
    for _ in range(_ROUNDS):
      started = time.process_time()
      index.search(asked, 100)
      times.append(time.process_time() - started)
    yield {
      "labels": labels,
      "cpu_ms_a_query": 1000 * statistics.median(times) / size.queries,
      "labels_gib": vectors,
      "peak_gib": _gib("/proc/self/status", "VmHWM"),
    }
    del index


def _gib(path: str, name: str) -> float:
  """Returns a value of a file of Linux that lists sizes in kB."""
  found = re.search(rf"^{name}:\s*(\d+) kB", Path(path).read_text("ascii"), re.MULTILINE)
  assert found is not None
  return int(found[1]) / 2**20


def virtual_rows(size: Size) -> Iterator[Row]:
  """Yields the measured cost of a small training step whose batch and parameters are split over virtual CPU devices.

  Raises:
    InputError: There are too few devices.
  """
  if len(jax.devices()) < max(size.virtual):
    raise InputError(
      f"{len(jax.devices())} devices: needs {max(size.virtual)}; run it as python -m benchmarks.cost_growth on a CPU"
    )
  config = full_config(TINY_MODEL | {"train.batch_size": size.batch})
  shape = DataSize(train=20_000, test=0, labels=10_000, tokens=15.0, images=0.0)
  for count in size.virtual:
    where = Machine(f"cpu:{count}", _VIRTUAL_CHIP, Torus((count,), 1.0, 1), jax.devices()[:count], count)
    # The same chunk on any number of devices, so that all of them compute the same numbers.
    workload = workload_on(config, shape, dataclasses.replace(where, devices=jax.devices()[: max(size.virtual)]))
    plan = Plan.of(workload, where, MeshPlan(1, count, 1, workload.config.train.chunk_rows))
    yield {"devices": count, **_measured_step(plan)}


def _measured_step(plan: Plan) -> Row:
  """Returns the processor time, memory and first loss of a plan's training step on the devices of the plan."""
  workload, mesh = plan.workload, plan.mesh
  model, config = workload.model, workload.config
  optimizer = optimizer_from_config(config, model, workload.steps)
  trained, frozen = model.split(init_params(model, mesh, seed=0))
  state = create_state(plan.state, trained, optimizer)
  batch = device_batch(workload.batch, None, mesh)
  how = step_config(config, model, workload.layout, workload.steps, workload.size.labels)
  step = make_train_step(how, plan.state, mesh).lower(state, frozen, batch).compile()
  memory = step.memory_analysis()
  losses, times = [], []
  for _ in range(1 + _ROUNDS):
    started = time.process_time()
    state, metrics = jax.block_until_ready(step(state, frozen, batch))
    times.append(time.process_time() - started)
    losses.append(float(metrics["loss"]))
  return {
    "cpu_ms_a_step": 1000 * statistics.median(times[1:]),
    "arrays_mib": memory.argument_size_in_bytes / 2**20,
    "temporaries_mib": memory.temp_size_in_bytes / 2**20,
    "first_loss": losses[0],
    "last_loss": losses[-1],
  }


def _labels(size: Size) -> Iterator[Row]:
  return label_rows(machine_of(_TOPOLOGY), full_config(), size.labels, compile_program)


def _batches(size: Size) -> Iterator[Row]:
  where = machine_of(_TOPOLOGY)
  return (step_row(plan_on(where, full_config({"train.batch_size": batch})), compile_program) for batch in size.batches)


def _devices(size: Size) -> Iterator[Row]:
  return (step_row(plan_on(machine_of(name), full_config()), compile_program) for name in size.topologies)


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the report.

  Attributes:
    title: What is varied, and how it is known.
    x: Column of the horizontal axis.
    panels: Columns of the lines of each panel of the plot, with their names, by the title of the panel. With `by`,
      there is one line for each value of that column.
    rows: Function that yields the rows, which are printed and written one at a time.
    by: Column that divides the rows.
  """

  title: str
  x: str
  panels: dict[str, dict[str, str]]
  rows: Callable[[Size], Iterator[Row]]
  by: str = ""

  def plot(self, rows: list[Row]) -> str:
    """Returns the plot of the rows as SVG."""
    panels = []
    for title, columns in self.panels.items():
      lines: dict[str, list[tuple[float, float]]] = {}
      for row in rows:
        for column, name in columns.items():
          lines.setdefault(row[self.by] if self.by else name, []).append((row[self.x], row[column]))
      panels.append(Panel(title, self.x, lines))
    return log_chart(self.title, panels)


_TIMES = {"expected_ms": "expected", "lower_bound_ms": "lower bound"}
PARTS = {
  "labels": Part(
    f"Programs that depend on the number of labels, compiled for {_TOPOLOGY}",
    "labels",
    {"lower bound, ms": {"lower_bound_ms": ""}, "memory in use, GiB a chip": {"gib_a_chip": ""}},
    _labels,
    by="program",
  ),
  "search": Part(
    "Exact search, measured on this machine",
    "labels",
    {
      "processor time, ms a query": {"cpu_ms_a_query": "exact search"},
      "memory, GiB": {"peak_gib": "process at most", "labels_gib": "labels"},
    },
    search_rows,
  ),
  "batch": Part(
    f"Training step by batch, compiled for {_TOPOLOGY}",
    "batch",
    {"time, ms a step": _TIMES, "memory in use, GiB a chip": {"gib_a_chip": "training step"}},
    _batches,
  ),
  "devices": Part(
    "Training step by number of chips, compiled for slices of v5e",
    "chips",
    {
      "time, ms a step": _TIMES | {"links_ms": "links"},
      "share of the expected time, %": {"percent_of_peak": "products at the peak rate", "percent_links": "links"},
    },
    _devices,
  ),
  "virtual": Part(
    "Small training step by number of virtual devices, measured on this machine",
    "devices",
    {
      "processor time, ms a step": {"cpu_ms_a_step": "all devices together"},
      "memory, MiB a device": {"arrays_mib": "arrays", "temporaries_mib": "temporaries"},
    },
    virtual_rows,
  ),
}


def main(arguments: list[str] | None = None) -> int:
  """Runs the parts; returns 1 if one of them cannot be run, else 0."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, separated by commas; by default all")
  parser.add_argument("--size", choices=SIZES, default="full", help="size of the work")
  parser.add_argument("--output", type=Path, default=Path("runs/cost_growth"), help="folder of cost_growth.json")
  parser.add_argument("--plots", type=Path, help="folder of the plots; by default that of --output")
  flags = parser.parse_args(arguments)
  names = flags.parts.split(",")
  unknown = [name for name in names if name not in PARTS]
  if unknown:
    parser.error(f"--parts={flags.parts}: no part {', '.join(unknown)}; choose among {', '.join(PARTS)}")
  failed = False
  for name in names:
    try:
      _run(name, SIZES[flags.size], flags.output, flags.plots or flags.output)
    except InputError as error:
      print(f"{name}: {error}", file=sys.stderr, flush=True)
      failed = True
  return int(failed)


def _run(name: str, size: Size, output: Path, plots: Path) -> None:
  """Runs a part, prints its table, and writes its rows and its plot after each row."""
  part, rows = PARTS[name], []
  found = part.rows(size)
  facts = {key: value for key, value in machine_facts("", 0, None).items() if key in ("hardware", "versions")}
  command = " ".join(["python -m benchmarks.cost_growth", *sys.argv[1:]])
  for folder in (output, plots):
    folder.mkdir(parents=True, exist_ok=True)
  path = output / "cost_growth.json"
  for row in found:
    if not rows:
      print(f"\n{part.title}\n\n{_line(row)}\n|{'---|' * len(row)}", flush=True)
    rows.append(row)
    print(_line(map(_text, row.values())), flush=True)
    written = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    write_json(path, written | {name: {"title": part.title, "command": command, **facts, "rows": rows}})
    with new_file(plots / f"cost_growth_{name}.svg") as work:
      work.write_text(part.plot(rows), encoding="utf-8")


def _line(cells: Any) -> str:
  return f"| {' | '.join(cells)} |"


def _text(value: Any) -> str:
  """Returns a cell of the table."""
  if isinstance(value, float):
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
  return f"{value:,}" if isinstance(value, int) else value


if __name__ == "__main__":
  # Programs for TPUs are only traced on this machine, so libtpu must not look for a device.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)
  sys.exit(main())
