"""Checks whether a config fits a machine: compiles all programs of a run, prints a report, writes JSON."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.ahead_of_time.compiling import compile_program
from vixml_jax.ahead_of_time.estimate import Compiler, Report, compile_train_step, estimate_run
from vixml_jax.ahead_of_time.fastest import fastest_fit, search_json, search_text
from vixml_jax.ahead_of_time.fitting import nearest_fit
from vixml_jax.ahead_of_time.machine import GIB, Machine
from vixml_jax.ahead_of_time.plan import Plan, mesh_plan_of, workload_on
from vixml_jax.ahead_of_time.report_json import report_json
from vixml_jax.ahead_of_time.report_text import report_text
from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.errors import InputError
from vixml_jax.files import write_json


def check_fit(
  config: ConfigDict,
  where: Machine,
  size: DataSize,
  json_path: Path | None = None,
  compiler: Compiler = compile_program,
) -> bool:
  """Compiles a config's programs for a machine and prints their memory, cost and time.

  If they do not fit, searches for the nearest mesh and chunk size that do, and prints these as well.

  Args:
    config: The whole config.
    where: The machine.
    size: Size of the data set.
    json_path: File that the same numbers are written to; None for no file.
    compiler: Function that compiles a program of a plan.

  Returns:
    Whether the config fits without changes.

  Raises:
    InputError: If the mesh does not match the machine, a size is not divisible by the mesh, or the file cannot be
      written.
  """
  workload = workload_on(config, size, where)
  asked = estimate_run(Plan.of(workload, where, mesh_plan_of(workload.config, where)), compiler)
  print(report_text(asked), flush=True)
  found = None
  if not asked.fits:
    other = nearest_fit(
      workload, where, asked.plan, asked.train.program, lambda plan: compile_train_step(plan, compiler)
    )
    if other is not None:
      found = estimate_run(other[0], compiler, compiled=[other[1]])
    print(_advice(asked, found), flush=True)
  _write(json_path, {"asked": report_json(asked), "nearest_fit": report_json(found) if found else None})
  return asked.fits


def find_fastest(
  config: ConfigDict,
  where: Machine,
  size: DataSize,
  most: int,
  json_path: Path | None = None,
  compiler: Compiler = compile_program,
) -> bool:
  """Compiles the training step in the ways that may be fastest, and prints them and the flags of the fastest that fits.

  Args:
    config: The whole config.
    where: The machine.
    size: Size of the data set.
    most: Maximum number of steps to compile.
    json_path: File that the same numbers are written to; None for no file.
    compiler: Function that compiles a program of a plan.

  Returns:
    Whether any of them fits.

  Raises:
    InputError: If the file cannot be written.
  """
  tried = fastest_fit(workload_on(config, size, where), where, lambda plan: compile_train_step(plan, compiler), most)
  print(search_text(tried), flush=True)
  _write(json_path, {"search": search_json(tried)})
  return bool(tried) and tried[0].fits


def _write(path: Path | None, values: dict[str, Any]) -> None:
  """Writes JSON, if there is a path."""
  if path is None:
    return
  try:
    write_json(path, values)
  except OSError as error:
    raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file for --json") from error


def _advice(asked: Report, found: Report | None) -> str:
  where, largest = asked.plan.where, asked.largest.program
  start = (
    f"does not fit: {largest.name} needs {largest.memory.total / GIB:.2f} GiB per chip; a program may use "
    f"{where.chip.hbm_bytes / GIB:.2f} on {where.name} ({where.budget})."
  )
  if found is None:
    return f"{start} No similar mesh of these chips fits. Use more chips, or chips with more memory."
  plan = found.plan.mesh_plan
  if not found.fits:
    other = found.largest.program
    start += f" {plan} fits the training step, but {other.name} needs {other.memory.total / GIB:.2f} GiB."
    return f"{start} Use more chips, or chips with more memory.\n\n{report_text(found)}"
  return f"{start} The nearest that fits: {plan}\n  {plan.flags}\n\n{report_text(found)}"
