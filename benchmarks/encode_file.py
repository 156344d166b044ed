"""Compares the time that `encode` takes for a file with that of the encoder alone, for the same items.

  .venv/bin/python -m benchmarks.encode_file --workdir=runs/quickstart --queries=q.jsonl --folder=runs/encode_file

Both use blocks of the same size, of which the first one compiles and is left out. The encoder alone gets token ids and
writes nothing; `encode` reads, checks and tokenizes the file, encodes it and writes Parquet files.
"""

import argparse
from pathlib import Path
import shutil
import time

from vixml_jax.inference.batch_encoding import encode_file
from vixml_jax.inference.block_runner import BatchFile
from vixml_jax.inference.queries import query_format
from vixml_jax.inference.query_files import open_queries
from vixml_jax.inference.trained_encoder import load_trained_encoder


def main() -> None:
  """Encodes the file in both ways and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--queries", type=Path, required=True)
  parser.add_argument("--folder", type=Path, default=Path("runs/encode_file"))
  parser.add_argument("--batch_size", type=int, default=4096)
  arguments = parser.parse_args()
  encoder = load_trained_encoder(arguments.workdir)
  queries = open_queries(arguments.queries, query_format(encoder.config))
  blocks = list(queries.blocks(arguments.batch_size, lambda number: True))
  tokens = [encoder.tokenizer([query.text for query in block]) for _, block in blocks]
  encoder.embed(tokens[0], whole_chunks=True)  # Compiles.
  started = time.perf_counter()
  for ids in tokens:
    encoder.embed(ids, whole_chunks=True)
  alone = time.perf_counter() - started
  output = arguments.folder / "embeddings"
  shutil.rmtree(output, ignore_errors=True)
  output.parent.mkdir(parents=True, exist_ok=True)
  started = time.perf_counter()
  batch = BatchFile(queries, arguments.queries, arguments.batch_size)
  count = encode_file(encoder, None, batch, str(output), dtype="float32")["queries"]
  seconds = time.perf_counter() - started
  print(f"| {count:,} items | items/s |\n|---|---:|")
  print(f"| encoder alone | {count / alone:,.0f} |\n| encode | {count / seconds:,.0f} |", flush=True)


if __name__ == "__main__":
  main()
