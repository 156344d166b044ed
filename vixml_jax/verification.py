"""Verifies the stored metrics of a workdir: computes them again, compares, and writes nothing to the workdir."""

from collections.abc import Iterator, Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.evaluation.evaluate_model import evaluate_model, final_metrics, small_vector_metrics
from vixml_jax.files import read_json_object
from vixml_jax.run.environment import describe_environment
from vixml_jax.run.restored_model import newest_model
from vixml_jax.run.setup import set_up_run
from vixml_jax.run.workdir import EVALUATION, FINAL_METRICS
from vixml_jax.text_columns import aligned

TIMES = ("train_seconds", "tokens_per_second")
"""Values of final_metrics.json that are measured in training, so that they cannot be computed again."""


@dataclasses.dataclass(frozen=True)
class Verification:
  """Stored metrics beside those that were computed again.

  Attributes:
    stored: Values of final_metrics.json without times.
    computed: The same values, computed again.
    tolerance: Greatest absolute difference of a metric that is accepted; metrics are in percent.
    environments: What was different when the stored metrics were computed: name -> (then, now).
  """

  stored: dict[str, float]
  computed: dict[str, float]
  tolerance: float
  environments: dict[str, tuple[str, str]]

  def differences(self) -> dict[str, float]:
    """Returns the absolute difference of each metric that is not equal; infinity where only one side has it."""
    found = {}
    for name in self.stored | self.computed:
      old, new = (float(values.get(name, math.inf)) for values in (self.stored, self.computed))
      if old != new and not (math.isnan(old) and math.isnan(new)):
        difference = abs(old - new)
        found[name] = math.inf if math.isnan(difference) else difference
    return found

  def beyond(self) -> dict[str, float]:
    """Returns the differences that are greater than the tolerance."""
    return {name: value for name, value in self.differences().items() if value > self.tolerance}

  def text(self) -> str:
    """Returns the metrics that differ as a table, what else differs, and a line with the numbers of metrics."""
    found = self.differences()
    cell = lambda value: "-" if value is None else f"{value:.6g}"
    rows = [
      [name, *(cell(values.get(name)) for values in (self.stored, self.computed)), f"{difference:.3g}"]
      for name, difference in found.items()
    ]
    table = aligned([["metric", "stored", "computed", "difference"], *rows]) if rows else []
    changes = [f"not as before: {name}: {then}; now {now}" for name, (then, now) in self.environments.items()]
    total, beyond = len(self.stored | self.computed), len(self.beyond())
    within = f", {len(found) - beyond} within {self.tolerance:g}, {beyond} beyond it" if found else ""
    return "\n".join([*table, *changes, f"{total} metrics: {total - len(found)} equal{within}"])


def verify_workdir(config: ConfigDict, workdir: Path, tolerance: float) -> Verification:
  """Computes the stored metrics of a workdir again.

  Data that is missing is prepared in the folder of the data, as for every evaluation.

  Args:
    config: The config of the workdir.
    workdir: Folder of an evaluated run.
    tolerance: Greatest accepted difference, in percentage points.

  Raises:
    InputError: The workdir has no metrics or no checkpoint, or what the run needs is missing or damaged.
  """
  absent = f"evaluate first: python -m vixml_jax.evaluate --workdir={workdir}"
  stored, evaluation = (
    read_json_object(workdir / name, absent=absent, damaged=absent) for name in (FINAL_METRICS, EVALUATION)
  )
  setup = set_up_run(config, workdir, extract=False)
  model = newest_model(setup, workdir)
  found = evaluate_model(setup.config, setup.data, setup.load_encoder(), model)
  computed = final_metrics(found, small_vector_metrics(found, setup.config))
  before, now = (dict(_flat(each)) for each in (evaluation.get("environment", {}), describe_environment()))
  changed = {name: (before.get(name, "-"), now.get(name, "-")) for name in before | now}
  return Verification(
    {name: value for name, value in stored.items() if name not in TIMES},
    computed,
    tolerance,
    {name: (then, today) for name, (then, today) in changed.items() if then != today},
  )


def _flat(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields name and value of each entry, and of each entry within one."""
  for name, value in environment.items():
    if isinstance(value, Mapping):
      yield from _flat(value)
    else:
      yield name, str(value)
