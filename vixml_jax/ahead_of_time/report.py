"""Whether a config fits a slice, and at what cost: compiled, printed as a table, written as JSON."""

from collections.abc import Callable, Iterable
import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.ahead_of_time.chips import GIB, Slice
from vixml_jax.ahead_of_time.compiling import Program, compile_encode, compile_train
from vixml_jax.ahead_of_time.cost import Collective, Cost
from vixml_jax.ahead_of_time.fitting import nearest_fit
from vixml_jax.ahead_of_time.programs import Plan, Workload, item_lengths, spread_asked_for
from vixml_jax.ahead_of_time.roofline import Roofline, model_flops
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.errors import InputError
from vixml_jax.files import write_json

_MOST_COLLECTIVES = 12


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a program comes to on a slice.

  Attributes:
    program: compiled.
    roofline: its least times; None where it was too large to compile.
    model_flops: that its items need on all chips, nothing computed twice.
    items: that one run of it goes through.
    tokens: of these.
    runs: how often it runs in training; of an encoding step, to embed all training queries and labels once.
  """

  program: Program
  roofline: Roofline | None
  model_flops: float
  items: float
  tokens: float
  runs: float

  @property
  def hours(self) -> float | None:
    """Of all runs, at the roofline."""
    return None if self.roofline is None else self.runs * self.roofline.seconds / 3600


@dataclasses.dataclass(frozen=True)
class Report:
  """A plan's two programs on a slice."""

  plan: Plan
  where: Slice
  train: Estimate
  encode: Estimate

  @property
  def estimates(self) -> tuple[Estimate, Estimate]:
    """Both, the training step first."""
    return self.train, self.encode

  @property
  def fits(self) -> bool:
    """Whether neither program needs more memory than a chip has."""
    return all(estimate.program.memory.total <= self.where.chip.hbm_bytes for estimate in self.estimates)


def check_fit(
  config: ConfigDict,
  where: Slice,
  size: DataSize,
  json_path: Path | None = None,
  compilers: tuple[Callable[[Plan], Program], Callable[[Plan], Program]] = (compile_train, compile_encode),
) -> bool:
  """Compiles a config's programs for a slice, and prints what they need and cost.

  Where they do not fit, looks for the nearest mesh and chunk size that do, and prints that too.

  Args:
    config: the whole config.
    where: the slice.
    size: of the data set.
    json_path: where to write the same numbers.
    compilers: of the training step and of the encoding step.

  Returns:
    Whether the config fits as it is.

  Raises:
    InputError: for a mesh that does not make the slice, or sizes that do not divide over it.
  """
  workload = Workload.of(config, size)
  asked = _report(Plan.of(workload, where, spread_asked_for(config, where)), where, compilers)
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

  # A chunk of an encoding holds what an average chunk of the batch does.
  return Report(
    plan,
    where,
    estimate(train, flops[0], 1.0, workload.steps),
    estimate(encode, flops[1], 1 / chunks, all_items * chunks / len(lengths)),
  )


def _advice(asked: Report, found: Report | None) -> str:
  needed = max(estimate.program.memory.total for estimate in asked.estimates) / GIB
  start = f"does not fit: {needed:.2f} GiB a chip, but {asked.where.name} has {asked.where.chip.hbm_bytes / GIB:.2f}."
  if found is None:
    return f"{start} No mesh of these chips that is near fits either: take more chips, or chips with more memory."
  return f"{start} The nearest that fits: {found.plan.spread}\n  {found.plan.spread.flags}\n\n{_table(found)}"


def _table(report: Report) -> str:
  """All numbers of a report as text."""
  workload, where = report.plan.workload, report.where
  config, size = workload.config, workload.size
  lines = [
    f"{config.name} on {where.name}, {len(where.devices)} chips: {report.plan.spread} of {config.train.row_length} "
    f"tokens, batch {config.train.batch_size}",
    f"{size.train:,} training queries, {size.labels:,} labels; {size.tokens:g} tokens and {size.images:g} images an "
    f"item; {report.train.tokens:,.0f} tokens a step, {config.train.epochs} epochs of "
    f"{workload.steps // config.train.epochs:,} steps",
    "",
    *_aligned(_rows(report)),
  ]
  collectives = report.train.program.cost and report.train.program.cost.collectives
  if collectives:
    lines += ["", *_aligned(_collective_rows(collectives.items()))]
  return "\n".join(lines)


def _rows(report: Report) -> list[list[str]]:
  """Name, unit and the value of each program."""
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
    ["of each chip", "", *(estimate.program.name for estimate in report.estimates)],
    row("arguments", "GiB", lambda e: e.program.memory.arguments / GIB),
    row("outputs besides them", "GiB", lambda e: e.program.memory.outputs / GIB),
    row("temporaries", "GiB", lambda e: _scaled(e.program.memory.temporaries, 1 / GIB)),
    row("code", "GiB", lambda e: e.program.memory.code / GIB),
    row("rest of the state", "GiB", lambda e: e.program.memory.others / GIB),
    row("total", "GiB", lambda e: e.program.memory.total / GIB),
    row(f"of {memory / GIB:.2f} GiB", "%", lambda e: 100 * e.program.memory.total / memory, 1),
    cost("matrix products", "TFLOP", lambda cost: cost.flops / 1e12, 3),
    row("what the model needs", "TFLOP", lambda e: e.model_flops / chips / 1e12, 3),
    cost("HBM traffic", "GB", lambda cost: cost.hbm_bytes / 1e9),
    cost("sent to other chips", "GB", lambda cost: cost.moved / 1e9),
    time("time of matrix products", "ms", lambda _, roofline: 1e3 * roofline.compute),
    time("time of HBM", "ms", lambda _, roofline: 1e3 * roofline.hbm),
    time("time of the interconnect", "ms", lambda _, roofline: 1e3 * roofline.interconnect),
    ["bound by", "", *map(bound, report.estimates)],
    time(
      "model FLOPs of the peak",
      "%",
      lambda e, roofline: 100 * e.model_flops / chips / report.where.chip.flops / roofline.seconds,
      1,
    ),
    time("of the slice: tokens/s", "", lambda e, roofline: e.tokens / roofline.seconds, 0),
    time("of the slice: items/s", "", lambda e, roofline: e.items / roofline.seconds, 0),
    row("all epochs / all items once", "h", lambda e: e.hours),
    row("compiling took", "s", lambda e: e.program.seconds, 0),
  ]


def _collective_rows(collectives: Iterable[tuple[Collective, float]]) -> list[list[str]]:
  """The collectives of the training step, those that send most first."""
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
    for collective, times in ordered[:_MOST_COLLECTIVES]
  ]
  rest = ordered[_MOST_COLLECTIVES:]
  if rest:
    sent = sum(collective.moved * times for collective, times in rest) / 1e9
    rows.append([f"{len(rest)} more", "", "", f"{sum(times for _, times in rest):,.0f}", f"{sent:,.3f}"])
  return rows


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:,.{digits}f}"


def _scaled(value: float | None, factor: float) -> float | None:
  return None if value is None else value * factor


def _aligned(rows: list[list[str]]) -> list[str]:
  """Columns of equal width: the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.rjust(width) if place else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]


def _numbers(report: Report) -> dict[str, Any]:
  """A report as JSON has it: bytes, FLOPs and seconds of each chip."""
  return {
    "topology": report.where.name,
    "chips": len(report.where.devices),
    "config": report.plan.workload.config.name,
    "spread": dataclasses.asdict(report.plan.spread),
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
    raise InputError(f"{path}: cannot be written ({error.strerror}); give another --json") from error
