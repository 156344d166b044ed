"""A report as text: a table of all programs, details of training and encoding, memory of the host."""

from collections.abc import Callable, Iterable

from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.estimate import Estimate, Report
from vixml_jax.ahead_of_time.machine import GIB
from vixml_jax.ahead_of_time.roofline import Roofline
from vixml_jax.text_columns import aligned

_MAX_COLLECTIVES = 12  # Rows of the table of collectives; the others are summed.


def report_text(report: Report) -> str:
  """Returns all numbers of a report as text."""
  plan, workload, where = report.plan, report.plan.workload, report.plan.where
  config, size = workload.config, workload.size
  lines = [
    f"{config.name} on {where.name}, {len(where.devices)} chips: {plan.mesh_plan} of {config.train.row_length} "
    f"tokens, batch {config.train.batch_size}",
    f"{size.train:,} training queries, {size.test:,} test queries, {size.labels:,} labels; {size.tokens:g} tokens and "
    f"{size.images:g} images per item, {size.labels_per_query:g} labels per query; {report.train.tokens:,.0f} tokens "
    f"per step, {config.train.epochs} epochs of {workload.steps // config.train.epochs:,} steps",
    "",
    *aligned(_program_rows(report)),
    f"in GiB per chip; a program may use {where.chip.hbm_bytes / GIB:.2f} ({where.budget}). s and h are lower bounds.",
    f"expected: kernels reach {where.chip.efficiency:.0%} of their lower bounds, as in a published run on such chips.",
    *_notes(report),
    "",
    *aligned(_detail_rows(report)),
  ]
  collectives = report.train.program.cost and report.train.program.cost.collectives
  if collectives:
    lines += ["", *aligned(_collective_rows(collectives.items()))]
  return "\n".join([*lines, "", *aligned(_host_rows(report))])


def _program_rows(report: Report) -> list[list[str]]:
  """Returns one row for each program: memory, whether it fits, time of a run, number of runs, hours."""
  limit = report.plan.where.chip.hbm_bytes
  rows = [
    [
      *("program", "arguments", "temporaries", "results", "rest of the run", "total", "fits"),
      *("s a run", "expected", "runs", "h", "expected"),
    ]
  ]
  for estimate in report.estimates:
    memory, roofline, end = estimate.program.memory, estimate.roofline, "+" if _endless(estimate) else ""
    rows.append(
      [
        estimate.program.name,
        _number(memory.arguments / GIB, 2),
        _number(None if memory.temporaries is None else (memory.temporaries + memory.code) / GIB, 2),
        _number(memory.outputs / GIB, 2),
        _number(memory.others / GIB, 2),
        _number(memory.total / GIB, 2),
        "yes" if memory.total <= limit else "NO",
        _number(None if roofline is None else roofline.lower_bound, 4) + end,
        _number(None if roofline is None else roofline.expected, 4) + end,
        _number(estimate.runs, 0),
        _number(estimate.hours, 2) + end,
        _number(estimate.expected_hours, 2) + end,
      ]
    )
  largest = report.largest.program
  rows.append(["largest, and all hours", "", "", "", "", _number(largest.memory.total / GIB, 2)])
  rows[-1] += ["yes" if report.fits else "NO", "", "", "", _number(report.hours, 2), _number(report.expected_hours, 2)]
  return rows


def _endless(estimate: Estimate) -> bool:
  return estimate.program.cost is not None and estimate.program.cost.endless > 0


def _notes(report: Report) -> list[str]:
  if not any(map(_endless, report.estimates)):
    return []
  return ["+: loops that end when they have converged are counted once."]


def _detail_rows(report: Report) -> list[list[str]]:
  """Returns the rows of the table of training and encoding: name, unit and the value of both programs."""
  where, estimates = report.plan.where, (report.train, report.encode)
  chips = len(where.devices)

  def row(name: str, unit: str, value: Callable[[Estimate], float | None], digits: int = 2) -> list[str]:
    return [name, unit, *(_number(value(estimate), digits) for estimate in estimates)]

  def cost(name: str, unit: str, value: Callable[[Cost], float], digits: int = 2) -> list[str]:
    return row(name, unit, lambda e: None if e.program.cost is None else value(e.program.cost), digits)

  def time(name: str, unit: str, value: Callable[[Estimate, Roofline], float | None], digits: int = 2) -> list[str]:
    return row(name, unit, lambda e: None if e.roofline is None else value(e, e.roofline), digits)

  def of_kind(kind: str) -> list[str]:
    return cost(f"of these in {kind}", "TFLOP", lambda cost: cost.flops_by_kind.get(kind, 0.0) / 1e12, 3)

  kinds = sorted({kind for e in estimates if e.program.cost for kind in e.program.cost.flops_by_kind})

  def bound(estimate: Estimate) -> str:
    return "-" if estimate.roofline is None else estimate.roofline.bound

  def both(name: str, unit: str, value: Callable[[Estimate, float], float], digits: int) -> list[list[str]]:
    return [
      time(f"{name}, at most", unit, lambda e, roofline: value(e, roofline.lower_bound), digits),
      time(f"{name}, expected", unit, lambda e, roofline: value(e, roofline.expected), digits),
    ]

  return [
    ["one run, per chip", "", *(estimate.program.name for estimate in estimates)],
    cost("matrix products", "TFLOP", lambda cost: cost.flops / 1e12, 3),
    *map(of_kind, kinds),
    row("model FLOPs", "TFLOP", lambda e: e.model_flops / chips / 1e12, 3),
    cost("HBM traffic", "GB", lambda cost: cost.hbm_bytes / 1e9),
    cost("sent to other chips", "GB", lambda cost: cost.moved / 1e9),
    time("time of matrix products", "ms", lambda _, roofline: 1e3 * roofline.compute),
    time("time of HBM traffic", "ms", lambda _, roofline: 1e3 * roofline.hbm),
    time("time of all kernels", "ms", lambda _, roofline: 1e3 * roofline.kernels),
    time("time of the interconnect", "ms", lambda _, roofline: 1e3 * roofline.interconnect),
    ["bound by", "", *map(bound, estimates)],
    time("lower bound of the time", "ms", lambda _, roofline: 1e3 * roofline.lower_bound),
    time("expected time", "ms", lambda _, roofline: 1e3 * roofline.expected),
    *both("model FLOPs utilization", "%", lambda e, seconds: 100 * e.utilization(where, seconds), 1),
    *both("tokens/s of all chips", "", lambda e, seconds: e.tokens / seconds, 0),
    *both("items/s of all chips", "", lambda e, seconds: e.items / seconds, 0),
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


def _host_rows(report: Report) -> list[list[str]]:
  """Returns one row for each kind of array that a process keeps on its host."""
  hosts = report.plan.where.hosts
  rows = [[f"memory of a process on its host ({hosts} {'process' if hosts == 1 else 'processes'})", "GiB"]]
  rows += [[name, _number(size / GIB, 2)] for name, size in report.host_memory.items()]
  return [*rows, ["total", _number(sum(report.host_memory.values()) / GIB, 2)]]


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:,.{digits}f}"
