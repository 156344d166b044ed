"""Compares the encoder in int8 with the one in float32 on the CPU: texts per second, cosine, and accuracy.

  .venv/bin/python -m benchmarks.int8_encoding [--size=cpu|tiny] [--rounds=5] [--workdir=runs/quickstart]
      [--raw_dir=DIR]

Speed is measured on the texts of the row `encoding` of `make bench`, with an encoder of the size of MiniLM-L6 and
random weights; both sides tokenize, in turns. With a workdir, the test queries of its data set are encoded by both
sides as well, with and without their images, and searched in its label index. "other best label" is the share of
queries whose first label differs. The machine must be idle.
"""

import argparse
from collections.abc import Callable, Mapping
import functools
import gzip
import json
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.bench.data import LONGEST, random_texts, write_bert
from benchmarks.bench.text_models import TextModel
import vixml_jax
from vixml_jax.datasets import raw, raw_images, raw_records
from vixml_jax.encoding.item_encoder import ItemEncoder, encoding_layout, normalize
from vixml_jax.evaluation.metrics import query_metrics
from vixml_jax.inference.loading import load_predictor
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, whole_items
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.onnx_models.calibration import random_items
from vixml_jax.onnx_models.quantization import int8_model
from vixml_jax.onnx_models.session import OnnxEncoder
from vixml_jax.ragged import Ragged
from vixml_jax.search.index import search_excluding
from vixml_jax.search.label_index import LabelIndex

_DEPTH = 100
_METRICS = ("P@1", "P@5", f"R@{_DEPTH}")
_SIZES = {"cpu": ("minilm-l6", 2048), "tiny": ("tiny-bert", 24)}


class Timed(NamedTuple):
  """What a side computed, and the medians of its rounds.

  Attributes:
    embeddings: float32 [texts, D] of unit norm.
    seconds: Seconds of a round.
    cpu_seconds: Seconds of all cores together, which depend less on other programs.
  """

  embeddings: np.ndarray
  seconds: float
  cpu_seconds: float


def timed(sides: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, Timed]:
  """Runs the sides in turns, after one call of each, and returns what each computed and how long it took."""
  embeddings = {name: embed() for name, embed in sides.items()}
  seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
  for _ in range(rounds):
    for name, embed in sides.items():
      started = time.perf_counter(), time.process_time()
      embed()
      seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
  return {name: Timed(embeddings[name], *map(statistics.median, zip(*seconds[name], strict=True))) for name in sides}


def synthetic(size: str, rounds: int) -> None:
  """Prints the speed on random texts."""
  name, count = _SIZES[size]
  model = TextModel.of(name, vocab_size=30522, dtype="float32")
  texts = random_texts(count, seed=1)
  tokenizer = Tokenizer(write_bert(model.encoder, model.params["encoder"]), LONGEST)
  layout = encoding_layout(PackedLayout(64, 32), model.mesh)
  ours = ItemEncoder(model.definition(), layout, model.mesh)
  params = jax.device_get({"encoder": model.params["encoder"]})
  examples = random_items(model.encoder["vocab_size"], tokenizer([""])[0].tolist(), LONGEST, layout)
  theirs = OnnxEncoder(int8_model(params, model.encoder, examples))
  lengths = tokenizer(texts).lengths
  print(f"{count:,} random texts of {lengths.mean():.1f} tokens on average")
  print_speed(
    timed(
      {
        "float32": lambda: ours.embed(model.params, Items.of_texts(tokenizer(texts))),
        "int8": lambda: normalize(theirs.pooled(whole_items(Items.of_texts(tokenizer(texts)), layout))),
      },
      rounds,
    )
  )


def trained(workdir: Path, raw_dir: Path | None, rounds: int) -> None:
  """Prints speed and accuracy on the test queries of a workdir."""
  predictors = {"float32": load_predictor(workdir, "exact"), "int8": load_predictor(workdir, "exact", encoder="int8")}
  first = predictors["float32"]
  config = first.encoder.config.dataset
  folder = raw_dir or Path(config.raw_dir or Path(vixml_jax.__file__).parent / "datasets" / config.name)
  records = test_records(folder)
  keys = ("title", "content", "images")
  queries = first.checked([{key: record[key] for key in keys if key in record} for record in records])
  truth = Ragged.from_rows([record["target_ind"] for record in records])
  filtered = raw_records.read_filter(folder / raw.SPLITS["test"].filter, len(queries), first.index.num_labels)
  tokens = first.encoder.tokenizer([query.text for query in queries])
  images = {"with images": first.image_vectors(queries, [])} if first.encoder.images else {}
  for what, vectors in (images | {"without images": None}).items():
    print(
      f"\n{len(queries):,} test queries of {workdir} {what}, texts of {tokens.lengths.mean():.1f} tokens on average"
    )
    sides = {
      name: functools.partial(predictor.encoder.embed, tokens, vectors, whole_chunks=True)
      for name, predictor in predictors.items()
    }
    found = timed(sides, rounds)
    print_speed(found)
    print_accuracy(first.index, {name: side.embeddings for name, side in found.items()}, truth, filtered)


def test_records(folder: Path) -> list[dict[str, Any]]:
  """Returns the test queries of a raw folder, with the encoded images of each as `images`."""
  files = raw.SPLITS["test"]
  with gzip.open(folder / files.rows, "rt", encoding="utf-8") as file:
    records = [json.loads(line) for line in file]
  if (folder / files.images).is_file():
    for record, (_, blobs) in zip(records, raw_images.read_images(folder / files.images, len(records)), strict=True):
      if blobs:
        record["images"] = blobs
  return records


def print_speed(found: Mapping[str, Timed]) -> None:
  """Prints what `timed` measured, and how near the embeddings of the two sides are."""
  ours, theirs = found["float32"], found["int8"]
  cosines = np.sum(ours.embeddings * theirs.embeddings, axis=1)
  for name, side in found.items():
    count = len(side.embeddings)
    print(
      f"  {name:8} {count / side.seconds:8,.0f} texts/s, {1000 * side.cpu_seconds / count:.2f} CPU seconds per 1,000"
    )
  print(
    f"  int8 is {ours.seconds / theirs.seconds:.2f} times as fast, {ours.cpu_seconds / theirs.cpu_seconds:.2f} times "
    f"in CPU time; cosine {cosines.mean():.5f} on average, at least {cosines.min():.5f}"
  )


def print_accuracy(index: LabelIndex, embeddings: Mapping[str, np.ndarray], truth: Ragged, filtered: Ragged) -> None:
  """Prints precision and recall of plain search with the embeddings of both sides, and their difference."""
  best, values = {}, {}
  for name, queries in embeddings.items():
    ids = search_excluding(index.label_index, queries, _DEPTH, filtered)[1]
    best[name] = ids[:, 0]
    values[name] = query_metrics(ids, truth, np.ones(index.num_labels), precision_ks=(1, 5), recall_ks=(_DEPTH,))
    means = values[name].mean()
    print(f"  {name:8} " + ", ".join(f"{metric} {means[metric]:.2f}" for metric in _METRICS))
  hits = {name: found.numerators[:, found.names.index("P@1")] for name, found in values.items()}
  change = 100 * (hits["int8"] - hits["float32"])
  print(
    f"  P@1 of int8 - float32: {change.mean():+.2f}, 95% interval +-{1.96 * change.std() / np.sqrt(len(change)):.2f}; "
    f"{100 * np.mean(best['int8'] != best['float32']):.1f}% of the queries have another best label"
  )


def main() -> None:
  """Measures what the arguments ask for."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=_SIZES, default="cpu")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--workdir", type=Path)
  parser.add_argument("--raw_dir", type=Path, help="raw data set of the workdir; by default that of its config")
  arguments = parser.parse_args()
  synthetic(arguments.size, arguments.rounds)
  if arguments.workdir is not None:
    trained(arguments.workdir, arguments.raw_dir, arguments.rounds)


if __name__ == "__main__":
  main()
