"""`report.html`: what an evaluation found, as one page for people, from the files that it wrote.

Every number in the page comes from final_metrics.json, evaluation.json, metrics.jsonl or retrieval_settings.json beside
it; only the examples are handed in.
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vixml_jax.report.charts import Line, bar_chart, line_chart
from vixml_jax.report.examples import Example
from vixml_jax.report.pages import write_page
from vixml_jax.report.table import COLUMNS

FILE = "report.html"
RETRIEVAL = "+ retrieval"
ROWS = {"plain": "plain", "augmented": RETRIEVAL}
"""How the two rows of an evaluation are called in tables."""


def write_report(
  workdir: Path, examples: Sequence[Example], learning_rates: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
  """Writes `report.html` into a workdir that has just been evaluated.

  Args:
    workdir: with config.json, final_metrics.json and evaluation.json; metrics.jsonl and retrieval_settings.json are
      shown where they are there.
    examples: queries to show.
    learning_rates: for each group of parameters (step, rate), the rate being linear between them.
  """
  config, final, evaluation = (_json(workdir / f"{name}.json") for name in ("config", "final_metrics", "evaluation"))
  write_page(
    workdir / FILE,
    "report.html",
    config=config,
    final=final,
    evaluation=evaluation,
    examples=examples,
    rankings=ROWS,
    metrics=_metrics_table(config, final, evaluation),
    all_metrics=_all_metrics(final, evaluation["intervals_95"]),
    images=_images_table(evaluation),
    deciles=_decile_charts(evaluation["by_label_frequency"]),
    decile_rows={ROWS[name]: rows for name, rows in evaluation["by_label_frequency"].items()},
    settings=_settings(workdir / "retrieval_settings.json", final),
    curves=_curves(workdir / "metrics.jsonl", learning_rates),
  )


def _metrics_table(config: dict[str, Any], final: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
  """The rows of the terminal's table: this run and what it has to beat."""
  rows = _rows_of(config["name"], {"metrics": final, "intervals_95": evaluation["intervals_95"]})
  baselines = [{"name": name, "cells": _cells(values, {})} for name, values in config.get("baselines", {}).items()]
  return {"columns": COLUMNS, "rows": rows, "baselines": baselines}


def _images_table(evaluation: dict[str, Any]) -> dict[str, Any] | None:
  """Queries by whether they have images, and all of them with fewer; None for a model of texts."""
  rows = []
  for name, group in evaluation["by_images"].items():
    rows += _rows_of(f"{group['queries']:,} queries {name}", group)
  for count, group in evaluation["by_test_images"].items():
    rows += _rows_of(f"all, at most {count} image{'' if count == '1' else 's'} a query", group)
  return {"columns": COLUMNS, "rows": rows, "baselines": []} if rows else None


def _rows_of(name: str, group: dict[str, Any]) -> list[dict[str, Any]]:
  """The plain row and, where there is one, the retrieval-augmented row."""
  metrics, intervals = group["metrics"], group["intervals_95"]
  rows = [{"name": name, "cells": _cells(metrics, intervals["plain"])}]
  augmented = {key.removeprefix("RA/"): value for key, value in metrics.items() if key.startswith("RA/")}
  if augmented:
    rows.append({"name": RETRIEVAL, "cells": _cells(augmented, intervals["augmented"])})
  return rows


def _cells(values: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> list[dict[str, Any] | None]:
  return [{"value": values[name], "interval": intervals.get(name)} if name in values else None for name in COLUMNS]


def _all_metrics(final: dict[str, Any], intervals: dict[str, Any]) -> list[dict[str, Any]]:
  """Every metric with its interval, plain and retrieval-augmented."""
  names = [name for name in final if "@" in name and "/" not in name]
  return [
    {
      "name": name,
      "cells": [
        {"value": final[key], "interval": intervals[row].get(name)} if key in final else None
        for row, key in (("plain", name), ("augmented", f"RA/{name}"))
      ],
    }
    for name in names
  ]


def _decile_charts(deciles: dict[str, list[dict[str, Any]]]) -> list[Markup]:
  """Of the greatest k of recall, and of the least of precision."""
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
        "decile of labels, rarest first",
      ),
    )
    for name, title in zip(shown, ("{} of each decile's pairs", "each decile's share of {}"), strict=True)
  ]


def _settings(path: Path, final: dict[str, Any]) -> dict[str, Any] | None:
  """Charts and table of what each lambda and temperature gives on held-out queries."""
  if not path.exists() or "RA/lambda" not in final:
    return None
  settings, chosen = _json(path), (final["RA/lambda"], final["RA/temperature"])
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
  """One chart for each value of training, by step, and those of the evaluations between epochs."""
  lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
  points: dict[tuple[str, str], list[tuple[float, float]]] = {}
  for line in lines:
    for name, value in line["values"].items():
      points.setdefault((line["split"], name), []).append((line["step"], value))
  charts = []
  if ("train", "loss") in points:
    charts.append(
      (
        "loss, and its mean over each epoch",
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
    charts.append(("seconds of each epoch", [_line("seconds", each, marks=True)]))
  between = {key: row for key, row in points.items() if key[0] not in ("train", "epoch")}
  for (split, name), row in between.items():
    if name in COLUMNS:
      augmented = between.get((split, f"RA/{name}"), [])
      charts.append(
        (f"{name} on {split} queries", [_line("plain", row, marks=True), _line(RETRIEVAL, augmented, "second", True)])
      )
  return [_titled(title, line_chart(title, drawn, "step")) for title, drawn in charts]


def _line(name: str, points: Sequence[tuple[float, float]], style: str = "first", marks: bool = False) -> Line:
  return Line(name, [x for x, _ in points], [y for _, y in points], style, marks)


def _titled(title: str, chart: Markup) -> Markup:
  return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, chart)


def _json(path: Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8"))
