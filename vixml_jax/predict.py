"""Predicts the labels of a file of queries with a trained workdir.

  python -m vixml_jax.predict --workdir=runs/NAME --queries=q.jsonl --k=10 --output=top.jsonl
      [--search=exact|scann] [--ranking=plain|retrieval_augmented|blend] [--tail=0.2] [--min_probability=0.1]
      [--retrieval_lambda=0.9] [--retrieval_temperature=0.05] [--index_dtype=int8|bit] [--dims=96] [--encoder=int8]
      [--keep_parts] [--num_processes=8 --process=0]

No training data are needed. Queries are JSON lines, CSV or Parquet: title, and optionally uid, content, images (paths,
bytes or feature vectors), allow and deny (uids of labels) and categories. The file may be larger than memory. A run
that was killed resumes when it is started again. Writes OUTPUT (.jsonl, .csv or .parquet) and OUTPUT.stats.json.
Several processes that see the same files divide the queries: each is started with its number as --process, or with
--distributed on a cluster that JAX detects. The last one writes the output.
"""

from typing import Any

from absl import flags

from vixml_jax import cli, inference_flags
from vixml_jax.run.workdir import CONFIG

_MODEL = inference_flags.define_model_flags(image_batch_size=64)
_SEARCH = inference_flags.define_search_flags()
_QUERIES = flags.DEFINE_string("queries", None, "File of queries: .jsonl, .csv or .parquet.")
_OUTPUT = flags.DEFINE_string("output", None, "File of predictions to write: .jsonl, .csv or .parquet.")
_K = flags.DEFINE_integer("k", 10, "Number of labels for each query; at most as many as there are.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 4096, "Number of queries that are encoded, searched and saved at a time.", lower_bound=1
)
_KEEP_PARTS = flags.DEFINE_bool(
  "keep_parts", False, "Leave a file for each block, in a folder named like the output without its suffix."
)


def main() -> None:
  """Predicts the labels of the queries that the flags name."""
  from vixml_jax.inference.batch_prediction import predict_file, prepare_output
  from vixml_jax.inference.block_runner import BatchFile
  from vixml_jax.inference.queries import query_format
  from vixml_jax.inference.query_files import open_queries
  from vixml_jax.remote import local_copy
  from vixml_jax.run import configuration

  workdir, path, output = _MODEL.folder(), local_copy(cli.required(_QUERIES)), cli.required(_OUTPUT)
  config = configuration.read(workdir / CONFIG)
  prepare_output(output, path, keep_parts=_KEEP_PARTS.value)
  queries = open_queries(path, query_format(config))
  batch = BatchFile(queries, path, _BATCH_SIZE.value, cli.process_share())
  _print(predict_file(_MODEL.load(_SEARCH), batch, output, k=_K.value, keep_parts=_KEEP_PARTS.value), output)


def _print(statistics: dict[str, Any], output: str) -> None:
  from vixml_jax.inference.block_timings import describe

  if "files" in statistics:
    print(f"{output}: predictions for {statistics['queries']:,} queries")
  else:
    print(f"{statistics['queries_of_this_process']:,} queries are answered; the last process writes {output}")
  for what in ("encode", "search"):
    if statistics[what]:
      print(describe(what, statistics[what], statistics["batch_size"]))


if __name__ == "__main__":
  cli.run(main, divides=True, saved="finished blocks are saved")
