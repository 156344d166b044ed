"""Evaluates a trained workdir again: other search, other retrieval settings, the validation split.

  python -m vixml_jax.evaluate --workdir=runs/NAME [--search=exact|scann] [--[no]retrieval_augmented]
      [--retrieval_lambda=0.9] [--retrieval_temperature=0.05] [--split=test|validation] [--test_images=0,1,2,3]
  python -m vixml_jax.evaluate --workdir=runs/NAME --compare=runs/OTHER[,runs/THIRD]

The first needs the data set that the run was trained on, no training; it writes final_metrics.json, evaluation.json,
per_query.npz and report.html. The second compares what such evaluations found, query by query, and needs nothing else;
it writes compare.json and compare.html.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from vixml_jax import cli
from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir
from vixml_jax.report.compare import compare_workdirs
from vixml_jax.run import configuration

_WORKDIR = flags.DEFINE_string("workdir", None, "A folder that vixml_jax.main wrote.")
_SEARCH = flags.DEFINE_enum("search", None, ["exact", "scann"], "How to search; by default as in training.")
_AUGMENTED = flags.DEFINE_bool("retrieval_augmented", None, "Whether to add the retrieval-augmented row.")
_LAMBDA = flags.DEFINE_float(
  "retrieval_lambda", None, "Weight of labels against training queries, 0 to 1; not chosen then."
)
_TEMPERATURE = flags.DEFINE_float("retrieval_temperature", None, "Temperature of retrieval; not chosen then.")
_TEST_IMAGES = flags.DEFINE_string(
  "test_images", None, "Also evaluate with no more than so many images a query, e.g. 0,1,2,3."
)
_SPLIT = flags.DEFINE_enum("split", None, ["test", "validation"], "What to evaluate on.")
_MESH = flags.DEFINE_string("mesh", None, "data,fsdp,tensor, such as 4,1,2; by default as in training.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the prepared data lies; by default as in training.")
_COMPARE = flags.DEFINE_list("compare", None, "Evaluated workdirs to compare with --workdir; nothing is evaluated.")


def main() -> None:
  """Evaluates the workdir that the flags name, or compares it with others."""
  workdir = Path(cli.required(_WORKDIR))
  if _COMPARE.value is not None:
    _compare(workdir, _COMPARE.value)
    return
  config = configuration.read(workdir / "config.json")
  _override(config)
  configuration.check(config)
  evaluate_workdir(config, workdir)


def _compare(workdir: Path, others: Sequence[str]) -> None:
  """Compares what was found before; refuses flags that say how to evaluate."""
  for flag in (_SEARCH, _AUGMENTED, _LAMBDA, _TEMPERATURE, _TEST_IMAGES, _SPLIT, _MESH, _DATA_DIR):
    if flag.present:
      raise InputError(
        f"--{flag.name}: says how to evaluate, but --compare evaluates nothing; evaluate each workdir "
        "with it first, then compare"
      )
  print(compare_workdirs(workdir, [Path(name) for name in others]), flush=True)


def _override(config: ConfigDict) -> None:
  """Puts the flags that were given into the config."""
  given = {
    "search": _SEARCH.value,
    "split": _SPLIT.value,
    "retrieval_augmented": _AUGMENTED.value,
    "retrieval_lambda": _LAMBDA.value,
    "retrieval_temperature": _TEMPERATURE.value,
  }
  config.eval.update({key: value for key, value in given.items() if value is not None})
  if _LAMBDA.value is not None or _TEMPERATURE.value is not None:
    config.eval.retrieval_choose = False
  if _TEST_IMAGES.value is not None:
    config.eval.test_images = tuple(cli.numbers(_TEST_IMAGES))
  if _DATA_DIR.value is not None:
    config.dataset.data_dir = _DATA_DIR.value
  if _MESH.value is not None:
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), cli.numbers(_MESH, 3), strict=True)))


if __name__ == "__main__":
  cli.run(main)
