"""Reports whether a config fits a slice and what it costs: compiles its programs, prints a table, writes JSON."""

from collections.abc import Callable, Iterable
import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.ahead_of_time.chips import GIB, Slice
from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.compiling import Program, compile_encode, compile_train
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.fitting import nearest_fit
from vixml_jax.ahead_of_time.programs import Plan, Workload, item_lengths, mesh_plan_of
from vixml_jax.ahead_of_time.roofline import Roofline, model_flops
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.errors import InputError
from vixml_jax.files import write_json
from vixml_jax.text_columns import aligned

_MAX_COLLECTIVES = 12  # Rows of the table of collectives; the others are summed.


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Cost and time of a program on a slice.

  Attributes:
    program: The compiled program.
    roofline: Lower bounds of its time; None if it was too large to compile.
    model_flops: FLOPs that its items need on all chips together, without any recomputation.
    items: Number of items that one run processes.
    tokens: Number of tokens of these items.
    runs: Number of runs: of the training step, in the whole training; of the encoding step, to embed all training
      queries and labels once.
  """

  program: Program
  roofline: Roofline | None
  model_flops: float
  items: float
  tokens: float
  runs: float

  @property
  def hours(self) -> float | None:
    """Hours of all runs at the roofline."""
    return None if self.roofline is None else self.runs * self.roofline.seconds / 3600


@dataclasses.dataclass(frozen=True)
class Report:
  """The two programs of a plan on a slice.

  Attributes:
    plan: The plan.
    where: The slice.
    train: Training step.
    encode: Encoding step.
  """

  plan: Plan
  where: Slice
  train: Estimate
  encode: Estimate

  @property
  def estimates(self) -> tuple[Estimate, Estimate]:
    """Training step and encoding step."""
    return self.train, self.encode

  @property
  def fits(self) -> bool:
    """Whether both programs fit into the memory of a chip."""
    return all(estimate.program.memory.total <= self.where.chip.hbm_bytes for estimate in self.estimates)


def check_fit(
  config: ConfigDict,
  where: Slice,
  size: DataSize,
  json_path: Path | None = None,
  compilers: tuple[Callable[[Plan], Program], Callable[[Plan], Program]] = (compile_train, compile_encode),
) -> bool:
  """Compiles a config's programs for a slice and prints their memory, cost and time.

  If they do not fit, searches for the nearest mesh and chunk size that do, and prints these as well.

  Args:
    config: The whole config.
    where: The slice.
    size: Size of the data set.
    json_path: File that the same numbers are written to; None for no file.
    compilers: Functions that compile the training step and the encoding step.

  Returns:
    Whether the config fits without changes.

  Raises:
    InputError: If the mesh does not match the slice, a size is not divisible by the mesh, or the file cannot be
      written.
  """
  workload = Workload.of(config, size)
  asked = _report(Plan.of(workload, where, mesh_plan_of(config, where)), where, compilers)
  print(_table(asked), flush=True)
  found = None
  if not asked.fits:
    other = nearest_fit(workload, where, asked.plan, asked.train.program, compilers[0])
    if other is not None:
      found = _report(other[0], where, (lambda _: other[1], compilers[1]))
    print(_advice(asked, found), flush=True)
  if json_path is not None:
    _write(json_path, {"asked": _numbers(asked), "nearest_fit": _numbers(found) if found else None})
  return asked.fits


def _report(plan: Plan, where: Slice, compilers: tuple[Callable[[Plan], Program], Callable[[Plan], Program]]) -> Report:
  train, encode = (compile_program(plan) for compile_program in compilers)
  workload = plan.workload
  items = workload.batch.items
  lengths = item_lengths(items.segments)
  tokens, chunks = lengths.sum(), items.segments.any(axis=(1, 2)).sum()
  all_items = workload.size.train + workload.size.labels
  flops = [model_flops(workload.model, lengths, train=trains) for trains in (True, False)]

  def estimate(program: Program, needed: float, share: float, runs: float) -> Estimate:
    roofline = None if program.cost is None else Roofline.of(program.cost, where)
    return Estimate(program, roofline, needed * share, len(lengths) * share, tokens * share, runs)

  # A chunk of the encoding step is assumed to hold as many items and tokens as an average chunk of the batch.
  return Report(
    plan,
    where,
    estimate(train, flops[0], 1.0, workload.steps),
    estimate(encode, flops[1], 1 / chunks, all_items * chunks / len(lengths)),
  )


def _advice(asked: Report, found: Report | None) -> str:
  needed = max(estimate.program.memory.total for estimate in asked.estimates) / GIB
  limit = asked.where.chip.hbm_bytes / GIB
  start = f"does not fit: needs {needed:.2f} GiB per chip; a chip of {asked.where.name} has {limit:.2f}."
  if found is None:
    return f"{start} No similar mesh of these chips fits. Use more chips, or chips with more memory."
  return f"{start} The nearest that fits: {found.plan.mesh_plan}\n  {found.plan.mesh_plan.flags}\n\n{_table(found)}"


def _table(report: Report) -> str:
  """Returns all numbers of a report as text."""
  workload, where = report.plan.workload, report.where
  config, size = workload.config, workload.size
  lines = [
    f"{config.name} on {where.name}, {len(where.devices)} chips: {report.plan.mesh_plan} of {config.train.row_length} "
    f"tokens, batch {config.train.batch_size}",
    f"{size.train:,} training queries, {size.labels:,} labels; {size.tokens:g} tokens and {size.images:g} images per "
    f"item; {report.train.tokens:,.0f} tokens per step, {config.train.epochs} epochs of "
    f"{workload.steps // config.train.epochs:,} steps",
    "",
    *aligned(_rows(report)),
  ]
  collectives = report.train.program.cost and report.train.program.cost.collectives
  if collectives:
    lines += ["", *aligned(_collective_rows(collectives.items()))]
  return "\n".join(lines)


def _rows(report: Report) -> list[list[str]]:
  """Returns the rows of the table: name, unit and the value of each program."""
  chips, memory = len(report.where.devices), report.where.chip.hbm_bytes

  def row(name: str, unit: str, value: Callable[[Estimate], float | None], digits: int = 2) -> list[str]:
    return [name, unit, *(_number(value(estimate), digits) for estimate in report.estimates)]

  def cost(name: str, unit: str, value: Callable[[Cost], float], digits: int = 2) -> list[str]:
    return row(name, unit, lambda e: None if e.program.cost is None else value(e.program.cost), digits)

  def time(name: str, unit: str, value: Callable[[Estimate, Roofline], float], digits: int = 2) -> list[str]:
    return row(name, unit, lambda e: None if e.roofline is None else value(e, e.roofline), digits)

  def bound(estimate: Estimate) -> str:
    return "-" if estimate.roofline is None else estimate.roofline.bound

  return [
    ["per chip", "", *(estimate.program.name for estimate in report.estimates)],
    row("arguments", "GiB", lambda e: e.program.memory.arguments / GIB),
    row("outputs not in place", "GiB", lambda e: e.program.memory.outputs / GIB),
    row("temporaries", "GiB", lambda e: _scaled(e.program.memory.temporaries, 1 / GIB)),
    row("code", "GiB", lambda e: e.program.memory.code / GIB),
    row("rest of the training state", "GiB", lambda e: e.program.memory.others / GIB),
    row("total", "GiB", lambda e: e.program.memory.total / GIB),
    row(f"of {memory / GIB:.2f} GiB", "%", lambda e: 100 * e.program.memory.total / memory, 1),
    cost("matrix products", "TFLOP", lambda cost: cost.flops / 1e12, 3),
    row("model FLOPs", "TFLOP", lambda e: e.model_flops / chips / 1e12, 3),
    cost("HBM traffic", "GB", lambda cost: cost.hbm_bytes / 1e9),
    cost("sent to other chips", "GB", lambda cost: cost.moved / 1e9),
    time("time of matrix products", "ms", lambda _, roofline: 1e3 * roofline.compute),
    time("time of HBM traffic", "ms", lambda _, roofline: 1e3 * roofline.hbm),
    time("time of the interconnect", "ms", lambda _, roofline: 1e3 * roofline.interconnect),
    ["bound by", "", *map(bound, report.estimates)],
    time(
      "model FLOPs utilization",
      "%",
      lambda e, roofline: 100 * e.model_flops / chips / report.where.chip.flops / roofline.seconds,
      1,
    ),
    time("tokens/s of the slice", "", lambda e, roofline: e.tokens / roofline.seconds, 0),
    time("items/s of the slice", "", lambda e, roofline: e.items / roofline.seconds, 0),
    row("all epochs / all items once", "h", lambda e: e.hours),
    row("compilation", "s", lambda e: e.program.seconds, 0),
  ]


def _collective_rows(collectives: Iterable[tuple[Collective, float]]) -> list[list[str]]:
  """Returns one row for each collective of the training step, sorted by the bytes sent."""
  ordered = sorted(collectives, key=lambda pair: -pair[0].moved * pair[1])
  rows = [["collectives of the train step", "chips", "MB", "times", "sent, GB"]]
  rows += [
    [
      collective.kind,
      str(collective.group),
      f"{collective.bytes / 1e6:,.3f}",
      f"{times:,.0f}",
      f"{collective.moved * times / 1e9:,.3f}",
    ]
    for collective, times in ordered[:_MAX_COLLECTIVES]
  ]
  rest = ordered[_MAX_COLLECTIVES:]
  if rest:
    sent = sum(collective.moved * times for collective, times in rest) / 1e9
    rows.append([f"{len(rest)} more", "", "", f"{sum(times for _, times in rest):,.0f}", f"{sent:,.3f}"])
  return rows


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:,.{digits}f}"


def _scaled(value: float | None, factor: float) -> float | None:
  return None if value is None else value * factor


def _numbers(report: Report) -> dict[str, Any]:
  """Returns a report as JSON: bytes, FLOPs and seconds are those of each chip."""
  return {
    "topology": report.where.name,
    "chips": len(report.where.devices),
    "config": report.plan.workload.config.name,
    "spread": dataclasses.asdict(report.plan.mesh_plan),  # The key is older than the name of the class.
    "data": dataclasses.asdict(report.plan.workload.size),
    "hbm_bytes": report.where.chip.hbm_bytes,
    "fits": report.fits,
    "train_step": _estimate_numbers(report.train),
    "encode_step": _estimate_numbers(report.encode),
  }


def _estimate_numbers(estimate: Estimate) -> dict[str, Any]:
  cost, roofline = estimate.program.cost, estimate.roofline
  return {
    "memory": dataclasses.asdict(estimate.program.memory),
    "compile_seconds": estimate.program.seconds,
    "model_flops_all_chips": estimate.model_flops,
    "items": estimate.items,
    "tokens": estimate.tokens,
    "runs": estimate.runs,
    "hours": estimate.hours,
    "flops": cost and cost.flops,
    "hbm_traffic": cost and cost.hbm_bytes,
    "sent": cost and cost.moved,
    "collectives": [dataclasses.asdict(collective) | {"times": times} for collective, times in cost.collectives.items()]
    if cost
    else None,
    "seconds": dataclasses.asdict(roofline) | {"roofline": roofline.seconds} if roofline else None,
  }


def _write(path: Path, value: Any) -> None:
  try:
    write_json(path, value)
  except OSError as error:
    raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file for --json") from error
