"""A report as JSON: bytes, FLOPs and seconds are those of each chip."""

import dataclasses
from typing import Any

from vixml_jax.ahead_of_time.estimate import Estimate, Report
from vixml_jax.ahead_of_time.roofline import Roofline


def report_json(report: Report) -> dict[str, Any]:
  """Returns all numbers of a report."""
  plan = report.plan
  return {
    "topology": plan.where.name,
    "chips": len(plan.where.devices),
    "config": plan.workload.config.name,
    "spread": dataclasses.asdict(plan.mesh_plan),  # The key is older than the name of the class.
    "data": dataclasses.asdict(plan.workload.size),
    "hbm_bytes": plan.where.chip.hbm_bytes,
    "fits": report.fits,
    "hours": report.hours,
    "expected_hours": report.expected_hours,
    "train_step": _estimate(report.train),
    "encode_step": _estimate(report.encode),
    "programs": {estimate.program.name: _estimate(estimate) for estimate in report.estimates},
    "host_memory": report.host_memory,
  }


def _estimate(estimate: Estimate) -> dict[str, Any]:
  cost, roofline = estimate.program.cost, estimate.roofline
  return {
    "memory": dataclasses.asdict(estimate.program.memory),
    "compile_seconds": estimate.program.seconds,
    "model_flops_all_chips": estimate.model_flops,
    "items": estimate.items,
    "tokens": estimate.tokens,
    "runs": estimate.runs,
    "hours": estimate.hours,
    "expected_hours": estimate.expected_hours,
    "flops": cost and cost.flops,
    "flops_by_kind": cost and cost.flops_by_kind,
    "hbm_traffic": cost and cost.hbm_bytes,
    "sent": cost and cost.moved,
    "collectives": [dataclasses.asdict(collective) | {"times": times} for collective, times in cost.collectives.items()]
    if cost
    else None,
    "seconds": _seconds(roofline) if roofline else None,
  }


def _seconds(roofline: Roofline) -> dict[str, float]:
  times = dataclasses.asdict(roofline)
  return {"roofline": times.pop("lower_bound")} | times  # The key is older than the name of the attribute.
