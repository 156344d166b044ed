"""Answers a file of queries from a trained workdir: the labels of highest score for each.

  python -m vixml_jax.predict --workdir=runs/NAME --queries=q.jsonl --k=10 --output=top.jsonl
      [--search=exact|scann] [--[no]retrieval_augmented] [--retrieval_lambda=0.9] [--retrieval_temperature=0.05]

Needs no training data. Queries are JSON lines, CSV or parquet: title, and where wanted uid, content, images (paths,
bytes or feature vectors), allow and deny (uids of labels) and categories. The file may be larger than memory; a run
that was killed goes on when it is started again. Writes OUTPUT (.jsonl, .csv or .parquet) and OUTPUT.stats.json.
"""

from pathlib import Path
from typing import Any

from absl import flags
import jax

from vixml_jax import cli
from vixml_jax.errors import InputError
from vixml_jax.inference.batch_prediction import answer_file, prepare_output
from vixml_jax.inference.predictor import load, query_format
from vixml_jax.inference.query_files import open_queries
from vixml_jax.run import configuration

_WORKDIR = flags.DEFINE_string("workdir", None, "A folder that vixml_jax.main wrote.")
_QUERIES = flags.DEFINE_string("queries", None, "The file of queries: .jsonl, .csv or .parquet.")
_OUTPUT = flags.DEFINE_string("output", None, "The file of answers: .jsonl, .csv or .parquet.")
_K = flags.DEFINE_integer("k", 10, "Labels a query.")
_SEARCH = flags.DEFINE_enum("search", None, ["exact", "scann"], "How to search; by default as the index was built.")
_AUGMENTED = flags.DEFINE_bool("retrieval_augmented", False, "Whether training queries have a say, too.")
_LAMBDA = flags.DEFINE_float(
  "retrieval_lambda", None, "Weight of labels against training queries, 0 to 1; by default as in the evaluation."
)
_TEMPERATURE = flags.DEFINE_float(
  "retrieval_temperature", None, "Temperature of retrieval; by default as in the evaluation."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4096, "Queries that are encoded, searched and kept at a time.")
_TOWER = flags.DEFINE_string(
  "image_checkpoint", None, "The SigLIP tower, for pictures; by default the one that the features were made with."
)
_IMAGE_BATCH_SIZE = flags.DEFINE_integer("image_batch_size", 64, "Pictures that go through the tower at a time.")
_MESH = flags.DEFINE_string("mesh", None, "data,fsdp,tensor, such as 4,1,2; by default as in training, or all devices.")


def main() -> None:
  """Answers the queries that the flags name."""
  if jax.process_count() > 1:
    raise InputError("--distributed: predict runs in one process; start it on a part of the queries in each")
  for flag in (_K, _BATCH_SIZE, _IMAGE_BATCH_SIZE):
    if flag.value < 1:
      raise InputError(f"--{flag.name}={flag.value}: must be at least 1")
  workdir, path, output = (Path(cli.required(flag)) for flag in (_WORKDIR, _QUERIES, _OUTPUT))
  config = configuration.read(workdir / "config.json")
  prepare_output(output, path)
  queries = open_queries(path, query_format(config))
  predictor = load(
    workdir,
    search=_SEARCH.value,
    retrieval_augmented=_AUGMENTED.value,
    retrieval_lambda=_LAMBDA.value,
    retrieval_temperature=_TEMPERATURE.value,
    image_checkpoint=_TOWER.value,
    image_batch_size=_IMAGE_BATCH_SIZE.value,
    mesh=cli.mesh(_MESH),
  )
  _print(answer_file(predictor, queries, path, output, k=_K.value, batch_size=_BATCH_SIZE.value), output)


def _print(statistics: dict[str, Any], output: Path) -> None:
  print(f"{output}: answers to {statistics['queries']:,} queries")
  for what in ("encode", "search"):
    if statistics[what]:
      print(
        "{}: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms a batch of {}; {queries_per_second:,.0f} queries/s".format(
          what, statistics["batch_size"], **statistics[what]
        )
      )


if __name__ == "__main__":
  cli.run(main)
