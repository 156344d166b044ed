"""Writes `report.html`: the results of an evaluation on one page.

All numbers on the page come from config.json, final_metrics.json, evaluation.json, metrics.jsonl,
retrieval_settings.json and provenance.json of the workdir. Only the queries that are shown and the map of labels are
passed in.
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup
from ml_collections import ConfigDict

from vixml_jax.files import read_json_object
from vixml_jax.report.charts import Line, bar_chart, line_chart, map_chart
from vixml_jax.report.examples import Example
from vixml_jax.report.label_map import LabelMap
from vixml_jax.report.pages import write_page
from vixml_jax.report.table import COLUMNS
from vixml_jax.run.configuration import flatten_config
from vixml_jax.run.provenance import provenance_lines, read_starts
from vixml_jax.run.workdir import (
  COMPARISON_PAGE,
  CONFIG,
  EVALUATION,
  FINAL_METRICS,
  METRICS,
  REPORT,
  RETRIEVAL_SETTINGS,
)

RETRIEVAL = "+ retrieval"
ROWS = {"plain": "plain", "augmented": RETRIEVAL, "blend": "blend"}
"""Names that tables show for the rows of an evaluation."""
_PREFIXES = {"plain": "", "augmented": "RA/", "blend": "blend/"}
_SUMMARY = ("P@1", "P@5", "PSP@1", "R@100")
_GROUPS = {
  "random": "A random sample of the queries with labels, the same for all models.",
  "worst": "The queries with the lowest nDCG of the last ranking; among equals, those with the most labels.",
  "best": "The queries with the highest nDCG of the last ranking; among equals, those with the most labels.",
}


def write_report(
  workdir: Path,
  examples: Mapping[str, Sequence[Example]],
  learning_rates: Mapping[str, Sequence[tuple[float, float]]],
  labels: LabelMap,
) -> None:
  """Writes `report.html` to an evaluated workdir.

  Args:
    workdir: Contains config.json, final_metrics.json and evaluation.json; metrics.jsonl, retrieval_settings.json and
      provenance.json are optional.
    examples: Queries to show: "random", and where there are some, "worst" and "best".
    learning_rates: The (step, learning rate) pairs of each group of parameters, between which the rate is linear.
    labels: Labels on a plane.

  Raises:
    InputError: If a required file cannot be read.
  """
  again = f"run python -m vixml_jax.evaluate --workdir={workdir} to write it again"
  config, final, evaluation = (
    read_json_object(workdir / name, absent=again, damaged=again) for name in (CONFIG, FINAL_METRICS, EVALUATION)
  )
  write_page(
    workdir / REPORT,
    "report.html",
    config=config,
    final=final,
    evaluation=evaluation,
    examples=[(name, _GROUPS[name], group) for name, group in examples.items() if group],
    rankings=ROWS,
    summary=_summary(final, evaluation),
    confusions={ROWS[name]: _confusions(pairs) for name, pairs in evaluation["confusions"].items() if pairs},
    label_map=_label_map(labels),
    settings_of_run=flatten_config(ConfigDict(config)),
    environment=evaluation["environment"],
    starts=[dict(provenance_lines(start)) for start in read_starts(workdir)],
    compared=(workdir / COMPARISON_PAGE).name if (workdir / COMPARISON_PAGE).exists() else None,
    example_rows=", then ".join(ROWS[name] for name in ROWS if name in evaluation["intervals_95"]),
    metrics=_metrics_table(config, final, evaluation),
    all_metrics=_all_metrics(final, evaluation["intervals_95"]),
    images=_images_table(evaluation),
    deciles=_decile_charts(evaluation["by_label_frequency"]),
    decile_rows={ROWS[name]: rows for name, rows in evaluation["by_label_frequency"].items()},
    blend=_blend(evaluation.get("blend")),
    settings=_settings(workdir / RETRIEVAL_SETTINGS, final),
    curves=_curves(workdir / METRICS, learning_rates if config["train"]["epochs"] else {}),
  )


def _summary(final: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
  """Returns the most important values of the ranking of highest precision, each with the best baseline."""
  rows = [row for row in ROWS if row in evaluation["intervals_95"]]
  (first, *_) = (name for name in final if name.startswith("P@"))
  best = max(rows, key=lambda row: final[f"{_PREFIXES[row]}{first}"])
  cards = []
  for name in _SUMMARY:
    key = f"{_PREFIXES[best]}{name}"
    if key in final:
      others = {baseline: values[name] for baseline, values in evaluation["baselines"].items() if name in values}
      highest = max(others, key=lambda baseline: others[baseline]) if others else None
      cards.append(
        {"name": name, "value": final[key], "baseline": highest and {"name": highest, "value": others[highest]}}
      )
  return {"row": ROWS[best], "cards": cards}


def _confusions(pairs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  """Returns the pairs of each label that is ranked first, in the order of the most frequent pair."""
  grouped: dict[str, list[dict[str, Any]]] = {}
  for pair in pairs:
    grouped.setdefault(pair["predicted"], []).append(pair)
  return grouped


def _label_map(labels: LabelMap) -> Markup | None:
  """Returns the map of labels; None for too few labels."""
  if not labels.texts:
    return None
  return map_chart("map of labels", "label-map", labels.positions, labels.frequencies, labels.texts)


def _metrics_table(config: dict[str, Any], final: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
  """Returns the rows of the terminal's table: the run and the baselines."""
  rows = _rows_of(config["name"], {"metrics": final, "intervals_95": evaluation["intervals_95"]})
  baselines = [{"name": name, "cells": _cells(values, {})} for name, values in evaluation["baselines"].items()]
  return {"columns": COLUMNS, "rows": rows, "baselines": baselines}


def _images_table(evaluation: dict[str, Any]) -> dict[str, Any] | None:
  """Returns rows for queries with images, without images and with fewer images; None for a model of texts only."""
  rows = []
  for name, group in evaluation["by_images"].items():
    rows += _rows_of(f"{group['queries']:,} queries {name}", group)
  for count, group in evaluation["by_test_images"].items():
    rows += _rows_of(f"all, at most {count} image{'' if count == '1' else 's'} per query", group)
  return {"columns": COLUMNS, "rows": rows, "baselines": []} if rows else None


def _rows_of(name: str, group: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the plain row and, if there are some, the retrieval-augmented row and that of the blend."""
  metrics, intervals = group["metrics"], group["intervals_95"]
  rows = [{"name": name, "cells": _cells(metrics, intervals["plain"])}]
  for row, prefix in _PREFIXES.items():
    values = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    if prefix and values:
      rows.append({"name": ROWS[row], "cells": _cells(values, intervals[row])})
  return rows


def _cells(values: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> list[dict[str, Any] | None]:
  return [{"value": values[name], "interval": intervals.get(name)} if name in values else None for name in COLUMNS]


def _all_metrics(final: dict[str, Any], intervals: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns all metrics with their intervals, for each row."""
  names = [name for name in final if "@" in name and "/" not in name]
  return [
    {
      "name": name,
      "cells": [
        {"value": final[key], "interval": intervals[row].get(name)} if key in final else None
        for row, key in ((row, f"{prefix}{name}") for row, prefix in _PREFIXES.items())
      ],
    }
    for name in names
  ]


def _decile_charts(deciles: dict[str, list[dict[str, Any]]]) -> list[Markup]:
  """Returns charts of recall at its largest k and of precision at its smallest k."""
  rows = deciles["plain"]
  names = [key for key in rows[0] if "@" in key]
  shown = [[name for name in names if name.startswith("R@")][-1], next(name for name in names if name.startswith("P@"))]
  return [
    _titled(
      title.format(name),
      bar_chart(
        title.format(name),
        [str(row["decile"]) for row in rows],
        {ROWS[key]: [row[name] for row in found] for key, found in deciles.items()},
        "decile of labels, rarest labels first",
      ),
    )
    for name, title in zip(shown, ("{} by decile", "contribution of each decile to {}"), strict=True)
  ]


def _blend(blend: dict[str, Any] | None) -> dict[str, Any] | None:
  """Returns charts of the dial and of the calibration, and their values; None without a blend."""
  if blend is None:
    return None
  dial, points = blend["dial"], blend["reliability"]
  title = "P@1 against PSP@1 for dials from 0 (right) to 1"
  lines = [_line("dial", [(point["P@1"], point["PSP@1"]) for point in dial], "first", True)]
  reliability = [
    _line("calibrated", [(0.0, 0.0), (1.0, 1.0)], "other"),
    _line("blend", [(point["probability"], point["share"]) for point in points], "first", True),
  ]
  name = "reliability: share of positives by probability"
  charts = [
    _titled(title, line_chart(title, lines, "P@1", (dial[0]["P@1"], dial[0]["PSP@1"]))),
    _titled(name, line_chart(name, reliability, "mean probability of the bin")),
  ]
  return {"charts": charts, "dial": dial, "points": points, "ece": blend["ECE"]}


def _settings(path: Path, final: dict[str, Any]) -> dict[str, Any] | None:
  """Returns charts and a table of the metrics of each lambda and temperature on held-out queries."""
  if not path.exists() or "RA/lambda" not in final:
    return None
  settings, chosen = json.loads(path.read_text(encoding="utf-8")), (final["RA/lambda"], final["RA/temperature"])
  temperatures = sorted({setting["temperature"] for setting in settings}, key=lambda value: (value == chosen[1], value))
  charts = []
  for name in settings[0]["metrics"]:
    lines, marked = [], None
    for temperature in temperatures:
      row = sorted((s["lambda_"], s["metrics"][name]) for s in settings if s["temperature"] == temperature)
      in_use = temperature == chosen[1]
      lines.append(_line(f"temperature {temperature:g}", row, "second" if in_use else "other", in_use))
      marked = next((point for point in row if in_use and point[0] == chosen[0]), marked)
    charts.append(_titled(f"{name} by lambda", line_chart(f"{name} by lambda", lines, "lambda", marked)))
  return {"charts": charts, "rows": settings, "chosen": chosen}


def _curves(path: Path, learning_rates: Mapping[str, Sequence[tuple[float, float]]]) -> list[Markup]:
  """Returns a chart by step of each value that training has logged and of the evaluations between epochs."""
  lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
  points: dict[tuple[str, str], list[tuple[float, float]]] = {}
  for line in lines:
    for name, value in line["values"].items():
      points.setdefault((line["split"], name), []).append((line["step"], value))
  charts = []
  if ("train", "loss") in points:
    charts.append(
      (
        "loss and its mean over each epoch",
        [
          _line("loss", points.pop(("train", "loss")), "other"),
          _line("mean of an epoch", points.pop(("epoch", "mean_loss"), []), "first", True),
        ],
      )
    )
  sharing: dict[tuple[tuple[float, float], ...], list[str]] = {}
  for name, rate in learning_rates.items():
    sharing.setdefault(tuple(rate), []).append(name)
  charts += [(f"learning rate of {', '.join(names)}", [_line(names[0], rate)]) for rate, names in sharing.items()]
  train = [(name, row) for (split, name), row in points.items() if split == "train"]
  charts += [(name.replace("_", " "), [_line(name, row)]) for name, row in sorted(train)]
  if ("epoch", "train_seconds") in points:
    seconds = points[("epoch", "train_seconds")]
    each = [(step, now - before) for (step, now), before in zip(seconds, [0.0, *(s for _, s in seconds)], strict=False)]
    charts.append(("seconds per epoch", [_line("seconds", each, marks=True)]))
  between = {key: row for key, row in points.items() if key[0] not in ("train", "epoch")}
  for (split, name), row in between.items():
    if name in COLUMNS:
      augmented, blend = (between.get((split, f"{prefix}/{name}"), []) for prefix in ("RA", "blend"))
      drawn = [_line("plain", row, marks=True), _line(RETRIEVAL, augmented, "second", True)]
      charts.append((f"{name} on {split} queries", [*drawn, _line("blend", blend, "other", True)]))
  return [_titled(title, line_chart(title, drawn, "step")) for title, drawn in charts]


def _line(name: str, points: Sequence[tuple[float, float]], style: str = "first", marks: bool = False) -> Line:
  return Line(name, [x for x, _ in points], [y for _, y in points], style, marks)


def _titled(title: str, chart: Markup) -> Markup:
  return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, chart)
