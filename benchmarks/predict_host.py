"""Measures how many queries per second `predict` reads, tokenizes, packs, searches and writes, with a tiny encoder.

  .venv/bin/python -m benchmarks.predict_host --queries=200000 --labels=10000 --folder=runs/predict_host

The encoder has random weights, one layer and width 32, so that the host takes nearly all of the time. Titles and labels
are 1 to 8 random words. The tokenizer is that of MiniLM. The script predicts 10 labels for each query of a JSON Lines
file and prints, for each format of the output, queries per second and CPU seconds of the process. The outputs stay in
the folder and depend on the arguments only, so that two versions can be compared.
"""

import argparse
import itertools
import json
from pathlib import Path
import time

import jax
import numpy as np

from configs import quickstart
from vixml_jax import sharding
from vixml_jax.inference.batch_prediction import predict_file
from vixml_jax.inference.block_runner import BatchFile
from vixml_jax.inference.predictor import Predictor
from vixml_jax.inference.queries import query_format
from vixml_jax.inference.query_files import open_queries
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.run.from_config import layout_from_config, model_from_config
from vixml_jax.run.state import init_params
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.label_index_files import IndexContents, write_index
from vixml_jax.weights import source

_WORDS = ["arrow", "cloud", "sun", "rain", "user", "file", "lock", "open", "star", "heart", "book", "map", "home"]
_DIM = 32


def tiny_encoder(workdir: Path) -> TrainedEncoder:
  """Returns an encoder with random weights, one layer and width 32."""
  config = quickstart.get_config()
  tokenizer = Tokenizer(source.resolve(config.encoder.pretrained), config.dataset.max_length)
  config.encoder.update(dict(num_layers=1, embed_dim=_DIM, num_heads=2, mlp_dim=4 * _DIM))
  config.train.free_vectors = 2
  mesh, definition = sharding.make_mesh(), model_from_config(config)
  return TrainedEncoder(
    workdir=workdir,
    checkpoint={},
    config=config,
    meta={},
    image_origin=None,
    definition=definition,
    tokenizer=tokenizer,
    layout=layout_from_config(config, tokenizer),
    mesh=mesh,
    params=init_params(definition, mesh, 0),
    frozen={},
  )


def titles(rng: np.random.Generator, count: int) -> list[str]:
  """Returns random titles."""
  return [" ".join(rng.choice(_WORDS, length)) for length in rng.integers(1, 9, count)]


def main() -> None:
  """Predicts the labels of random titles and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--queries", type=int, default=200_000)
  parser.add_argument("--labels", type=int, default=10_000)
  parser.add_argument("--folder", type=Path, default=Path("runs/predict_host"))
  parser.add_argument("--formats", default="jsonl,csv,parquet")
  arguments = parser.parse_args()
  folder, rng = arguments.folder, np.random.default_rng(0)
  folder.mkdir(parents=True, exist_ok=True)
  queries = folder / "queries.jsonl"
  with queries.open("w") as file:
    file.writelines(json.dumps({"title": title}) + "\n" for title in titles(rng, arguments.queries))
  few = folder / "few.jsonl"
  with few.open("w") as file, queries.open() as whole:
    file.writelines(itertools.islice(whole, 4096))
  labels = rng.standard_normal((arguments.labels, _DIM), np.float32)
  contents = IndexContents(
    labels / np.linalg.norm(labels, axis=1, keepdims=True),
    titles(rng, arguments.labels),
    [f"label/{number}" for number in range(arguments.labels)],
    np.zeros(arguments.labels, np.int32),
    np.zeros((2, _DIM), np.float32),
  )
  write_index(folder / "index", contents, checkpoint={}, search="exact")
  predictor = Predictor(tiny_encoder(folder), LabelIndex.open(folder / "index", checkpoint=None), None, None)
  form = query_format(predictor.encoder.config)
  print(f"{arguments.queries:,} queries, {arguments.labels:,} labels, {jax.device_count()} x {jax.default_backend()}")
  print("| output | queries/s | CPU seconds per 1,000 queries |")
  print("|---|---:|---:|")
  for suffix in arguments.formats.split(","):
    output = folder / f"top.{suffix}"
    predict_file(predictor, BatchFile(open_queries(few, form), few, 4096), str(output), k=10)  # Compiles.
    started, cpu = time.perf_counter(), time.process_time()
    predict_file(predictor, BatchFile(open_queries(queries, form), queries, 4096), str(output), k=10)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"| {suffix} | {arguments.queries / seconds:,.0f} | {1000 * cpu / arguments.queries:.4f} |", flush=True)


if __name__ == "__main__":
  main()
