"""Predicts the labels of a file of queries with a trained workdir.

  python -m vixml_jax.predict --workdir=runs/NAME --queries=q.jsonl --k=10 --output=top.jsonl
      [--search=exact|scann] [--ranking=plain|retrieval_augmented|blend] [--tail=0.2] [--min_probability=0.1]
      [--retrieval_lambda=0.9] [--retrieval_temperature=0.05] [--index_dtype=int8|bit] [--dims=96]

No training data are needed. Queries are JSON lines, CSV or Parquet: title, and optionally uid, content, images (paths,
bytes or feature vectors), allow and deny (uids of labels) and categories. The file may be larger than memory. A run
that was killed resumes when it is started again. Writes OUTPUT (.jsonl, .csv or .parquet) and OUTPUT.stats.json.
"""

from pathlib import Path
from typing import Any

from absl import flags
import jax

from vixml_jax import cli, inference_flags
from vixml_jax.errors import InputError
from vixml_jax.inference.batch_prediction import predict_file, prepare_output
from vixml_jax.inference.queries import query_format
from vixml_jax.inference.query_files import open_queries
from vixml_jax.run import configuration
from vixml_jax.run.workdir import CONFIG

_MODEL = inference_flags.define_model_flags(image_batch_size=64)
_SEARCH = inference_flags.define_search_flags()
_QUERIES = flags.DEFINE_string("queries", None, "File of queries: .jsonl, .csv or .parquet.")
_OUTPUT = flags.DEFINE_string("output", None, "File of predictions to write: .jsonl, .csv or .parquet.")
_K = flags.DEFINE_integer("k", 10, "Number of labels for each query.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 4096, "Number of queries that are encoded, searched and saved at a time.", lower_bound=1
)


def main() -> None:
  """Predicts the labels of the queries that the flags name."""
  if jax.process_count() > 1:
    raise InputError("--distributed: predict runs in one process; give each process a part of the queries")
  workdir, path, output = (Path(cli.required(flag)) for flag in (_MODEL.workdir, _QUERIES, _OUTPUT))
  config = configuration.read(workdir / CONFIG)
  prepare_output(output, path)
  queries = open_queries(path, query_format(config))
  predictor = _MODEL.load(_SEARCH)
  _print(predict_file(predictor, queries, path, output, k=_K.value, batch_size=_BATCH_SIZE.value), output)


def _print(statistics: dict[str, Any], output: Path) -> None:
  print(f"{output}: predictions for {statistics['queries']:,} queries")
  for what in ("encode", "search"):
    if statistics[what]:
      print(
        "{}: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms per batch of {}; {queries_per_second:,.0f} queries/s".format(
          what, statistics["batch_size"], **statistics[what]
        )
      )


if __name__ == "__main__":
  cli.run(main)
