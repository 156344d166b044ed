"""Writes README.md of an exported folder: a model card as the Hugging Face hub reads it, from the files of the run."""

from collections.abc import Mapping, Sequence
import functools
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
import jinja2
from ml_collections import ConfigDict

import vixml_jax
from vixml_jax.errors import InputError
from vixml_jax.exporting import licenses
from vixml_jax.files import read_json_object
from vixml_jax.row_files import RowFiles
from vixml_jax.run.checkpoint import newest_checkpoint
from vixml_jax.run.workdir import CHECKPOINTS, EMBEDDINGS, EVALUATION, FINAL_METRICS
from vixml_jax.weights.published import PUBLISHED

README = "README.md"
COLUMNS = ("P@1", "P@5", "PSP@1", "PSP@5", "R@100")
"""Metrics that the card shows."""

# Format -> `library_name` and `pipeline_tag` of the metadata.
_LIBRARIES: dict[str, tuple[str, str | None]] = {
  "hf": ("transformers", "feature-extraction"),
  "peft": ("peft", "feature-extraction"),
  "sentence-transformers": ("sentence-transformers", "sentence-similarity"),
  "onnx": ("onnx", "feature-extraction"),
  "label-vectors": ("vixml_jax", None),
}
_WITH_IMAGES = ("onnx", "label-vectors")  # Formats that contain what a model makes of images.
# Ranking -> the prefix of its keys in final_metrics.json, and its name for readers.
_RANKINGS = {"plain": ("", "plain"), "augmented": ("RA/", "retrieval-augmented"), "blend": ("blend/", "blend")}
_TASK = "Extreme multi-label retrieval"
_RECIPE = (
  "method",
  "encoder.architecture",
  "encoder.num_layers",
  "encoder.embed_dim",
  "encoder.pooling",
  "encoder.lora_rank",
  "encoder.base_dtype",
  "prompt.template",
  "dataset.text_fields",
  "dataset.max_length",
  "images",
  "fusion.method",
  "fusion.adapter",
  "fusion.residual",
  "features.name",
  "train.epochs",
  "train.batch_size",
  "train.learning_rate",
  "train.new_learning_rate",
  "mining.cluster_size",
  "seed",
)
_OF_IMAGES = ("fusion.", "features.")


def write_model_card(workdir: Path, config: ConfigDict, kind: str, folder: Path, usage: Mapping[str, Any]) -> Path:
  """Writes README.md and returns its path.

  Args:
    workdir: Folder of the run. A card without results is written if it has no evaluation.
    config: Its config.
    kind: Format of the folder.
    folder: Folder that the other files were written to.
    usage: What the writer of the format returned, for the template of that format.

  Raises:
    InputError: A file of the run is damaged.
  """
  step, meta = newest_checkpoint(workdir / CHECKPOINTS)
  evaluation, final = (_optional_json(workdir / name) for name in (EVALUATION, FINAL_METRICS))
  rows = [] if evaluation is None or final is None else _rows(config, evaluation, final)
  base = base_on_hub(config)
  license_ = licenses.BASES.get(base.partition("@")[0]) if base else None
  metadata = _metadata(config, kind, rows, evaluation, base, license_)
  text = _template().render(
    kind=kind,
    name=config.name,
    config=config,
    usage=usage,
    version=vixml_jax.__version__,
    step=step,
    tokens=meta.get("tokens"),
    evaluation=evaluation,
    num_train=_num_train(workdir),
    columns=COLUMNS,
    rows=[{"name": row["name"], "cells": [_cell(row, column) for column in COLUMNS]} for row in rows],
    has_intervals=any(row["intervals"] for row in rows),
    recipe=_recipe(config),
    base=base,
    license=license_,
    data_license=licenses.DATA.get(config.dataset.name),
  )
  path = folder / README
  path.write_text(f"---\n{metadata.to_yaml()}\n---\n\n{text}", encoding="utf-8")
  return path


def base_on_hub(config: ConfigDict) -> str | None:
  """Returns the name on the hub of the weights that training started from; None if it is unknown."""
  pretrained = config.encoder.pretrained
  if config.encoder.random_init:
    return None
  if pretrained in licenses.PACKAGES:
    return licenses.PACKAGES[pretrained]
  return pretrained if pretrained.partition("@")[0] in PUBLISHED else None


def _optional_json(path: Path) -> dict[str, Any] | None:
  again = "evaluate the run again, or delete the file for a card without results"
  return read_json_object(path, absent=again, damaged=again) if path.exists() else None


def _num_train(workdir: Path) -> int | None:
  """Returns the number of training queries; None if their embeddings were removed."""
  try:
    return RowFiles(workdir / EMBEDDINGS, "train_queries").shape[0]
  except InputError:
    return None


def _rows(config: ConfigDict, evaluation: Mapping[str, Any], final: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the rows of the table of results.

  Each has `name`, `metrics`, `intervals`, and `images`: the most images that a query had, None for a baseline.
  """
  groups = [("", config.images, final, evaluation["intervals_95"])]
  for count, group in evaluation["by_test_images"].items():
    name = f", at most {count} image{'' if count == '1' else 's'} per query"
    groups.append((name, int(count), group["metrics"], group["intervals_95"]))
  rows = []
  for suffix, images, metrics, intervals in groups:
    for ranking, (prefix, name) in _RANKINGS.items():
      values = {column: metrics[prefix + column] for column in COLUMNS if prefix + column in metrics}
      if values:
        rows.append(
          {"name": name + suffix, "metrics": values, "intervals": intervals.get(ranking, {}), "images": images}
        )
  for name, values in evaluation["baselines"].items():
    rows.append({"name": f"baseline: {name}", "metrics": values, "intervals": {}, "images": None})
  return rows


def _cell(row: Mapping[str, Any], column: str) -> str:
  if column not in row["metrics"]:
    return "-"
  value = f"{row['metrics'][column]:.2f}"
  if column not in row["intervals"]:
    return value
  low, high = row["intervals"][column]
  return f"{value} ({low:.2f} to {high:.2f})"


def _metadata(
  config: ConfigDict,
  kind: str,
  rows: Sequence[Mapping[str, Any]],
  evaluation: Mapping[str, Any] | None,
  base: str | None,
  license_: licenses.License | None,
) -> ModelCardData:
  """Returns the metadata. What is not known, such as the language, is left out."""
  library, pipeline = _LIBRARIES[kind]
  vectors = kind == "label-vectors"
  # A folder that encodes texts only has the results of queries without images.
  images = config.images if kind in _WITH_IMAGES else 0
  results = [row for row in rows if row["images"] == images]
  optional: dict[str, Any] = {}
  if evaluation and results:
    optional = {"model_name": config.name, "eval_results": _eval_results(config, results, evaluation)}
  if license_ is not None and not vectors:
    optional |= {"license": license_.identifier, "license_name": license_.name, "license_link": license_.link}
  if base is not None and not vectors:
    optional["base_model"] = base.partition("@")[0]
  return ModelCardData(
    library_name=library,
    pipeline_tag=pipeline,
    tags=["vixml_jax", "extreme-multi-label-classification", "retrieval", *([] if vectors else ["feature-extraction"])],
    **optional,
  )


def _eval_results(
  config: ConfigDict, rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]
) -> list[EvalResult]:
  return [
    EvalResult(
      task_type="text-retrieval",
      task_name=_TASK,
      dataset_type=config.dataset.name,
      dataset_name=config.dataset.name,
      dataset_split=evaluation["split"],
      metric_type=metric.lower().replace("@", "_at_"),
      metric_name=f"{metric} in percent, {row['name']}",
      metric_value=round(value, 2),
    )
    for row in rows
    for metric, value in row["metrics"].items()
  ]


def _recipe(config: ConfigDict) -> list[tuple[str, str]]:
  """Returns the config keys that describe the recipe, with their values."""
  flat = {name: value for name, value in _flat(config.to_dict()) if name in _RECIPE}
  return [
    (name, ", ".join(flat[name]) if isinstance(flat[name], list | tuple) else str(flat[name]))
    for name in _RECIPE
    if name in flat and flat[name] != "" and (config.images or not name.startswith(_OF_IMAGES))
  ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  found = []
  for key, value in values.items():
    found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
  return found


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(  # nosec B701 - model cards are Markdown, not pages.
    loader=jinja2.PackageLoader("vixml_jax.exporting"),
    autoescape=False,  # Markdown.
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters.update(cell=_as_cell, count=lambda number: f"{number:,}")
  return environment.get_template("model_card.jinja")


def _as_cell(text: str) -> str:
  """Returns a text that stays within one cell of a table."""
  return " ".join(str(text).split()).replace("|", "\\|")
