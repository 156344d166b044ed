"""Writes the embeddings of a file of items with the encoder of a trained workdir.

  python -m vixml_jax.encode --workdir=runs/NAME --queries=items.jsonl --output=embeddings
      [--dtype=float32|float16] [--dims=96] [--batch_size=16384] [--num_processes=8 --process=0]

Items have the form of queries for predict: JSON lines, CSV or Parquet with title, and optionally uid, content and
images. No label index and no training data are needed. A run that was killed resumes when it is started again, and
several processes divide the items as those of predict do. Writes a folder OUTPUT of Parquet files with the columns row,
uid and embedding (of fixed size and unit norm), and OUTPUT.stats.json.
"""

from typing import Any

from absl import flags

from vixml_jax import cli, inference_flags
from vixml_jax.run.workdir import CONFIG

_MODEL = inference_flags.define_model_flags(image_batch_size=64)
_QUERIES = flags.DEFINE_string("queries", None, "File of items: .jsonl, .csv or .parquet.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of embeddings to write.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Type of the embeddings in the files.")
_DIMS = flags.DEFINE_integer(
  "dims", None, "Number of first dimensions of the embeddings to write, at unit norm; by default all.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16384, "Number of items that are encoded and saved at a time, as one file.", lower_bound=1
)


def main() -> None:
  """Encodes the items that the flags name."""
  from vixml_jax.inference.batch_encoding import encode_file
  from vixml_jax.inference.block_runner import BatchFile
  from vixml_jax.inference.part_store import check_writable
  from vixml_jax.inference.queries import query_format
  from vixml_jax.inference.query_files import open_queries
  from vixml_jax.remote import local_copy
  from vixml_jax.run import configuration
  from vixml_jax.search.vector_form import VectorForm

  output = cli.required(_OUTPUT).rstrip("/")
  check_writable(output)
  workdir, path = _MODEL.folder(), local_copy(cli.required(_QUERIES))
  config = configuration.read(workdir / CONFIG)
  VectorForm(dims=_DIMS.value).check(config.encoder.embed_dim, "exact")
  queries = open_queries(path, query_format(config))
  batch = BatchFile(queries, path, _BATCH_SIZE.value, cli.process_share())
  _print(encode_file(*_MODEL.load_encoder(), batch, output, dtype=_DTYPE.value, dims=_DIMS.value), output)


def _print(statistics: dict[str, Any], output: str) -> None:
  from vixml_jax.inference.block_timings import describe

  if "files" in statistics:
    print(f"{output}: embeddings of {statistics['queries']:,} items in {len(statistics['files']):,} files")
  else:
    print(f"{statistics['queries_of_this_process']:,} items are encoded; the last process completes {output}")
  if statistics["encode"]:
    print(describe("encode", statistics["encode"], statistics["batch_size"]))


if __name__ == "__main__":
  cli.run(main, divides=True, saved="finished blocks are saved")
