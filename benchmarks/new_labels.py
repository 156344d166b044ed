r"""Compares labels that are added after training with labels that the model was trained on.

  .venv/bin/python -m benchmarks.new_labels --config=configs/quickstart.py:images=3 --folder=runs/new_labels \
      [--fraction=0.1] [--seed=0] [--positives=0,5,1000] [--config.train.epochs=...]

A share of the labels, drawn by the seed, is removed from the data set: from the labels, from the targets of training
queries (queries without any other target are dropped) and from the filters. The config is trained on the rest in
FOLDER/held_out-FRACTION-SEED and on all labels in FOLDER/all; a run that was killed resumes. The held-out labels are
then added to the first model, as `vixml_jax.add_labels` does, with at most as many of their training queries as
positives as `--positives` says; each number has an index of its own.

All test queries are searched among all labels. New and old labels are scored separately, over the queries that have
such labels. For P@1, R@10 and R@100 on new labels, the positives are the new labels, and old positives of the query are
removed from the ranking, so that neither kind counts as an error of the other. "all" is the usual score. "+ retrieval"
uses the settings that the run chose on held-out queries with old labels only. The results are written to
FOLDER/results.json.
"""

from collections.abc import Callable
import dataclasses
import gzip
import json
from pathlib import Path
import shutil
import time
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import vixml_jax
from vixml_jax import cli
from vixml_jax.datasets import raw, raw_images, raw_records
from vixml_jax.evaluation.metrics import evaluate
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.files import new_folder, write_json
from vixml_jax.inference.label_files import label_format
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.new_labels import add_labels, embed_labels
from vixml_jax.inference.predictor import Predictor
from vixml_jax.ragged import Ragged
from vixml_jax.row_files import RowFiles
from vixml_jax.run import configuration
from vixml_jax.run.workdir import EMBEDDINGS, INDEX
from vixml_jax.search import retrieval_augmented
from vixml_jax.search.index import search_excluding
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.retrieval_augmented import RetrievalSettings

_DEPTH = 100
_SHOWN = [
  ("new", "P@1"),
  ("new", "R@10"),
  ("new", "R@100"),
  ("old", "P@1"),
  ("old", "R@10"),
  ("old", "R@100"),
  ("all", "P@1"),
  ("all", "R@100"),
]

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config; a variant follows a colon.")
_FOLDER = flags.DEFINE_string("folder", None, "Folder for data, workdirs and results.")
_FRACTION = flags.DEFINE_float("fraction", 0.1, "Share of the labels that is held out.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the held-out labels and of their positives.")
_POSITIVES = flags.DEFINE_string(
  "positives", "0,5,1000", "Largest number of training queries for an added label; several numbers are tried in turn."
)


def write_without(source: Path, target: Path, held_out: np.ndarray) -> None:
  """Writes a raw folder without some of its labels; training queries that lose all labels are left out.

  Args:
    source: Raw folder to read.
    target: Raw folder to write; must not exist.
    held_out: Labels to leave out, bool [L].
  """
  labels = np.where(held_out, -1, np.cumsum(~held_out) - 1)
  with new_folder(target) as work:
    for split, files in raw.SPLITS.items():
      records = _records(source / files.rows)
      if split == "labels":
        rows = labels
      else:
        lost = [_drop_labels(record, labels) for record in records]
        kept = ~np.asarray(lost) if split == "train" else np.ones(len(lost), bool)
        rows = np.where(kept, np.cumsum(kept) - 1, -1)
      with gzip.open(work / files.rows, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record, row in zip(records, rows, strict=True) if row >= 0)
      if files.filter:
        pairs = raw_records.read_filter(source / files.filter, len(rows), len(labels))
        found = np.stack([rows[pairs.row_ids()], labels[pairs.values]], axis=1)
        np.savetxt(work / files.filter, found[(found >= 0).all(axis=1)], fmt="%d")
      if (source / files.images).is_file():
        _write_images(source / files.images, work / files.images, rows)


def score(
  search: Callable[[Ragged], np.ndarray], to_id: np.ndarray, is_new: np.ndarray, truth: Ragged, excluded: Ragged
) -> dict[str, dict[str, float]]:
  """Returns scores of new, old and all labels; only labels in the index count.

  Args:
    search: Function from the labels to leave out for each query to ids int [Q, 100], best first.
    to_id: Id of each label in the index, int [L]; -1 for a label that is not in the index.
    is_new: Whether each label is new, bool [L].
    truth: Positives of each query, Q rows of labels.
    excluded: Labels that a query may not have, Q rows.

  Returns:
    For "new", "old" and "all": `queries`, the number of queries with such positives, and metrics over these in percent.
    "new" and "all" are left out if the index does not contain the new labels.
  """
  there = to_id >= 0
  filtered = _of_labels(excluded, there, to_id)
  scores = {}
  groups = {"new": is_new, "old": ~is_new, "all": there} if there.all() else {"old": ~is_new}
  for name, counted in groups.items():
    positives = _of_labels(truth, counted, to_id)
    rows = np.flatnonzero(positives.lengths)
    ids = search(_joined(filtered, _of_labels(truth, there & ~counted, to_id)))
    found = evaluate(
      ids[rows], positives.take(rows), np.ones(int(to_id.max()) + 1), precision_ks=(1,), recall_ks=(10, _DEPTH)
    )
    scores[name] = {"queries": len(rows)} | {metric: found[metric] for metric in ("P@1", "R@10", f"R@{_DEPTH}")}
  return scores


@dataclasses.dataclass(frozen=True)
class _Data:
  """The whole data set, with labels numbered as in its raw files."""

  labels: list[dict]
  train: list[dict]
  truth: Ragged
  excluded: Ragged
  is_new: np.ndarray

  @classmethod
  def read(cls, folder: Path, is_new: np.ndarray, images: int) -> "_Data":
    """Reads a raw folder, with the first images of each item."""
    records = {split: _records(folder / files.rows) for split, files in raw.SPLITS.items()}
    for split in ("train", "labels"):
      path = folder / raw.SPLITS[split].images
      for record, (_, blobs) in zip(records[split], raw_images.read_images(path, len(records[split])), strict=True):
        if images and blobs:
          record["images"] = blobs[:images]
    return cls(
      records["labels"],
      records["train"],
      Ragged.from_rows([record["target_ind"] for record in records["test"]]),
      raw_records.read_filter(folder / raw.SPLITS["test"].filter, len(records["test"]), len(records["labels"])),
      is_new,
    )

  def new_labels(self, most: int, seed: int) -> list[dict]:
    """Returns the held-out labels, each with at most `most` of its training queries as positives."""
    queries = Ragged.from_rows([record["target_ind"] for record in self.train]).transpose(len(self.labels))
    rng = np.random.default_rng(seed)
    found = []
    for label in np.flatnonzero(self.is_new):
      rows = rng.permutation(queries[label])[:most]
      positives = [_item(self.train[row]) for row in rows if self.train[row]["title"].strip()]
      found.append(_item(self.labels[label]) | {"uid": self.labels[label]["uid"], "positives": positives})
    return found


def evaluated(index: LabelIndex, workdir: Path, data: _Data) -> dict[str, Any]:
  """Returns scores of plain and retrieval-augmented search of the test queries of a workdir in an index."""
  queries = RowFiles(workdir / EMBEDDINGS, "test_queries").load()
  live = set(index.uids(np.flatnonzero(~index.deleted)))
  to_id = np.full(len(data.labels), -1)
  there = [number for number, label in enumerate(data.labels) if label["uid"] in live]
  to_id[there] = index.ids_of([data.labels[number]["uid"] for number in there])
  searches: dict[str, Callable[[Ragged], np.ndarray]] = {
    "plain": lambda exclude: search_excluding(index.label_index, queries, _DEPTH, exclude)[1]
  }
  how = index.retrieval
  if how is not None:
    settings = RetrievalSettings.from_json(how)
    neighbors = retrieval_augmented.search_both(
      index.label_index, index.query_index, queries, label_hits=settings.hits, query_hits=settings.num_query_hits
    )
    neighbors = neighbors.nearest(settings.hits) if settings.joint else neighbors
    searches["retrieval"] = lambda exclude: retrieval_augmented.combine(
      neighbors,
      index.query_labels,
      num_labels=index.num_labels,
      lambda_=how["lambda"],
      temperature=how["temperature"],
      k=_DEPTH,
      exclude=exclude,
    )[1]
  return {name: score(search, to_id, data.is_new, data.truth, data.excluded) for name, search in searches.items()}


def compare(config: ConfigDict, folder: Path, fraction: float, seed: int, positives: list[int]) -> dict[str, Any]:
  """Trains both models, adds the held-out labels to the first with each number of positives, and returns all scores."""
  source = Path(config.dataset.raw_dir or Path(vixml_jax.__file__).parent / "datasets" / config.dataset.name)
  raw.find_files(source)
  num_labels = raw_records.count_rows(source / raw.SPLITS["labels"].rows)
  is_new = np.zeros(num_labels, bool)
  is_new[np.random.default_rng(seed).choice(num_labels, round(fraction * num_labels), replace=False)] = True
  less = folder / f"raw-{fraction:g}-{seed}"
  if not less.is_dir():
    write_without(source, less, is_new)
  data = _Data.read(source, is_new, config.images)
  workdirs = {"held out": folder / f"held_out-{fraction:g}-{seed}", "all": folder / "all"}
  train_and_evaluate(_config_of(config, less, folder), workdirs["held out"])
  train_and_evaluate(config.copy_and_resolve_references(), workdirs["all"])
  predictor = load_predictor(workdirs["held out"])
  results = {"before adding": evaluated(predictor.index, workdirs["held out"], data)}
  for most in positives:
    name = "added" + (f", with up to {most} positives" if most else ", by text and images alone")
    index, seconds = _added(predictor, data.new_labels(most, seed), folder / f"index-{most}")
    results[name] = evaluated(index, workdirs["held out"], data) | {"seconds": seconds}
  results["trained with all labels"] = evaluated(load_predictor(workdirs["all"]).index, workdirs["all"], data) | {
    "seconds": json.loads((workdirs["all"] / "final_metrics.json").read_text())["train_seconds"]
  }
  return {"new_labels": int(is_new.sum()), "labels": num_labels, "seed": seed, "rows": results}


def table(rows: dict[str, Any]) -> str:
  """Returns the scores as a Markdown table."""
  head = ["", *(f"{group} {metric}" for group, metric in _SHOWN), "seconds"]
  lines = [head, ["---", *["---:"] * (len(head) - 1)]]
  for name, row in rows.items():
    for kind in ("plain", "retrieval"):
      if kind in row:
        cells = [row[kind].get(group, {}).get(metric) for group, metric in _SHOWN]
        seconds = f"{row['seconds']:.0f}" if kind == "plain" and "seconds" in row else ""
        lines.append(
          [
            name if kind == "plain" else f"{name} + retrieval",
            *("" if cell is None else f"{cell:.2f}" for cell in cells),
            seconds,
          ]
        )
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
  """Runs the comparison and prints the scores."""
  config, folder = cli.required(_CONFIG), Path(cli.required(_FOLDER))
  configuration.check(config)
  results = compare(config, folder, _FRACTION.value, _SEED.value, cli.numbers(_POSITIVES))
  write_json(folder / "results.json", results | {"config": config.name})
  print(f"{results['new_labels']:,} of {results['labels']:,} labels are new; seconds to add them, or to train")
  print(table(results["rows"]))


def _config_of(config: ConfigDict, raw_dir: Path, folder: Path) -> ConfigDict:
  """Returns the config for the reduced data set, without the baselines of the whole data set."""
  config = config.copy_and_resolve_references()
  config.dataset.update(dict(name="custom", raw_dir=str(raw_dir), data_dir=str(folder / f"data-{raw_dir.name}")))
  config.baselines = ConfigDict()
  return config


def _added(predictor: Predictor, records: list[dict], folder: Path) -> tuple[LabelIndex, float]:
  """Returns a copy of the index with the labels added, and the seconds that adding took."""
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(predictor.encoder.workdir / INDEX, folder)
  index = LabelIndex.open(folder, checkpoint=predictor.encoder.checkpoint, mesh=predictor.mesh)
  predictor = dataclasses.replace(predictor, index=index)
  form = label_format(predictor.encoder.config)
  started = time.perf_counter()
  labels = [form.parse(record, record["uid"]) for record in records]
  index = add_labels(predictor.index, labels, embed_labels(predictor, labels), np.zeros(0, np.int64))
  return index, time.perf_counter() - started


def _records(path: Path) -> list[dict]:
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def _item(record: dict) -> dict:
  return {key: record[key] for key in ("title", "content", "images") if key in record}


def _drop_labels(record: dict, labels: np.ndarray) -> bool:
  """Renumbers the targets of a query and drops those numbered -1; returns whether it lost all of its targets."""
  kept = [place for place, label in enumerate(record["target_ind"]) if labels[label] >= 0]
  lost = bool(record["target_ind"]) and not kept
  record["target_ind"] = [int(labels[record["target_ind"][place]]) for place in kept]
  record["target_rel"] = [record["target_rel"][place] for place in kept]
  return lost


def _write_images(source: Path, target: Path, rows: np.ndarray) -> None:
  images = pq.read_table(source)
  numbers = rows[images.column("row").to_numpy()]
  place = images.schema.get_field_index("row")
  images = images.set_column(place, images.schema.field(place), pa.array(numbers, images.schema.field(place).type))
  pq.write_table(images.filter(pa.array(numbers >= 0)), target)


def _of_labels(rows: Ragged, counted: np.ndarray, to_id: np.ndarray) -> Ragged:
  """Returns the ids of the counted labels of each row."""
  kept = counted[rows.values]
  return Ragged.of_lengths(to_id[rows.values[kept]], np.bincount(rows.row_ids()[kept], minlength=len(rows)))


def _joined(first: Ragged, second: Ragged) -> Ragged:
  """Returns rows with the values of both arguments."""
  rows = np.concatenate([first.row_ids(), second.row_ids()])
  values = np.concatenate([first.values, second.values])[np.argsort(rows, kind="stable")]
  return Ragged.of_lengths(values, np.bincount(rows, minlength=len(first)))


if __name__ == "__main__":
  cli.run(main)
