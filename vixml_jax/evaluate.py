"""Evaluates a trained workdir again, or compares evaluated workdirs.

  python -m vixml_jax.evaluate --workdir=runs/NAME [--search=exact|scann] [--[no]retrieval_augmented]
      [--retrieval_lambda=0.9] [--retrieval_temperature=0.05] [--[no]blend] [--baselines=tfidf,untrained]
      [--split=test|validation] [--test_images=0,1,2,3] [--small_vectors=384,96]
  python -m vixml_jax.evaluate --workdir=runs/NAME --compare=runs/OTHER[,runs/THIRD]
  python -m vixml_jax.evaluate --workdir=runs/NAME --verify [--tolerance=0.01]

The first command evaluates the newest checkpoint without training, for example with another search, other settings of
retrieval augmentation or on the validation split. It needs the data set of the run, and writes final_metrics.json,
evaluation.json, per_query.npz and report.html. The second command compares the results of such evaluations query by
query. It needs only the workdirs, and writes compare.json and compare.html. The third command computes the metrics of
final_metrics.json again and prints which are not equal and by how much. It writes nothing to the workdir, and exits
with status 1 if one differs by more than the tolerance.
"""

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vixml_jax import cli, compile_cache_flag
from vixml_jax.errors import InputError
from vixml_jax.run.workdir import CONFIG, FINAL_METRICS

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run, written by vixml_jax.main, or its URL in a bucket.")
_SEARCH = flags.DEFINE_enum("search", None, ["exact", "scann"], "Search method; default: that of the config.")
_AUGMENTED = flags.DEFINE_bool("retrieval_augmented", None, "Whether to evaluate with retrieval augmentation as well.")
_LAMBDA = flags.DEFINE_float(
  "retrieval_lambda", None, "Weight of labels relative to training queries, 0 to 1; a given value is used as it is."
)
_TEMPERATURE = flags.DEFINE_float(
  "retrieval_temperature", None, "Temperature of retrieval augmentation; a given value is used as it is."
)
_BLEND = flags.DEFINE_bool("blend", None, "Whether to fit the blend, evaluate it and write it to the label index.")
_QUERY_TEXTS = flags.DEFINE_bool(
  "query_texts",
  None,
  "Whether the label index keeps texts of the training queries, which explanations show; default: that of the config.",
)
_BASELINES = flags.DEFINE_list(
  "baselines",
  None,
  "Methods to compute on the same split: some of tfidf, untrained, plt; default: those of the config.",
)
_TEST_IMAGES = flags.DEFINE_string(
  "test_images",
  None,
  "Numbers of images; also evaluates with at most each number of images per query, such as 0,1,2,3.",
)
_SMALL_VECTORS = flags.DEFINE_string(
  "small_vectors",
  None,
  "Numbers of dimensions; also evaluates plain search with each of them, in float32, int8 and bits, such as 384,96. -1 "
  "stands for those of train.matryoshka_dims; empty for none; default: those of the config.",
)
_SPLIT = flags.DEFINE_enum(
  "split", None, ["test", "validation"], "Queries to evaluate on; default: those of the config."
)
_MESH = flags.DEFINE_string(
  "mesh", None, "Sizes data,fsdp,tensor of the mesh, such as 4,1,2; default: those of the config."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of the prepared data, or its URL in a bucket; default: that of the config."
)
_COMPARE = flags.DEFINE_list(
  "compare", None, "Evaluated workdirs to compare with --workdir, without evaluating anything."
)
_VERIFY = flags.DEFINE_bool(
  "verify", False, "Computes the metrics of final_metrics.json again and compares; writes nothing to the workdir."
)
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 0.01, "Greatest difference that --verify accepts, in percentage points.", lower_bound=0
)
_COMPILE_CACHE = compile_cache_flag.define()


def main() -> None:
  """Evaluates the workdir of the flags, verifies its metrics, or compares it with others."""
  from vixml_jax.report.compare import compare_workdirs
  from vixml_jax.run.bucket_workdir import open_workdir

  place = cli.place(cli.required(_WORKDIR), "workdir")
  if _COMPARE.value is not None:
    _check_alone("compare", "evaluates nothing; evaluate each workdir with it first", _SPLIT, _MESH, _DATA_DIR, _VERIFY)
    workdirs = [cli.local_path(name, "compare") for name in _COMPARE.value]
    print(compare_workdirs(cli.local_path(place, "workdir"), workdirs), flush=True)
    return
  with open_workdir(place, exists=True) as workdir:
    _evaluate(workdir.folder)


def _evaluate(workdir: Path) -> None:
  """Evaluates a workdir, or verifies its metrics."""
  from vixml_jax.experiment import evaluate_workdir
  from vixml_jax.run import configuration

  config = configuration.read(workdir / CONFIG)
  if _VERIFY.value:
    _check_alone("verify", "evaluates as the workdir was evaluated; evaluate it with this flag first", _SPLIT)
  _override(config)
  configuration.check(config)
  compile_cache_flag.use(_COMPILE_CACHE)
  if _VERIFY.value:
    _verify(config, workdir)
  else:
    evaluate_workdir(config, workdir, cli.show)


def _check_alone(mode: str, reason: str, *others: flags.FlagHolder[Any]) -> None:
  """Checks that no flag of the evaluation is given with --compare or --verify, and none of `others`."""
  searches = (
    _SEARCH,
    _AUGMENTED,
    _LAMBDA,
    _TEMPERATURE,
    _BLEND,
    _QUERY_TEXTS,
    _BASELINES,
    _TEST_IMAGES,
    _SMALL_VECTORS,
  )
  for flag in (*searches, *others):
    if flag.present:
      raise InputError(f"--{flag.name}: cannot be used with --{mode}, which {reason}")


def _verify(config: ConfigDict, workdir: Path) -> None:
  """Prints how the stored metrics differ from computed ones.

  Raises:
    InputError: One differs by more than the tolerance.
  """
  from vixml_jax.verification import verify_workdir

  verification = verify_workdir(config, workdir, _TOLERANCE.value)
  cli.show(verification.text())
  beyond = verification.beyond()
  if beyond:
    name = max(beyond, key=lambda each: beyond[each])
    raise InputError(
      f"{workdir / FINAL_METRICS}: {len(beyond)} metrics differ by more than --tolerance={_TOLERANCE.value:g}, most of "
      f"all {name}; evaluate again to store what this machine computes, or compare checkpoint, data and versions"
    )


def _override(config: ConfigDict) -> None:
  """Replaces values of the config by those of the given flags, and the attention by what these devices support."""
  config.encoder.attention = "auto"
  given = {
    "search": _SEARCH.value,
    "split": _SPLIT.value,
    "retrieval_augmented": _AUGMENTED.value,
    "retrieval_lambda": _LAMBDA.value,
    "retrieval_temperature": _TEMPERATURE.value,
    "blend": _BLEND.value,
    "query_texts": _QUERY_TEXTS.value,
  }
  config.eval.update({key: value for key, value in given.items() if value is not None})
  if _LAMBDA.value is not None or _TEMPERATURE.value is not None:
    config.eval.retrieval_choose = False
  if _BASELINES.value is not None:
    config.eval.baselines = tuple(_BASELINES.value)
  if _TEST_IMAGES.value is not None:
    config.eval.test_images = tuple(cli.numbers(_TEST_IMAGES))
  if _SMALL_VECTORS.value is not None:
    config.eval.small_vectors = tuple(cli.numbers(_SMALL_VECTORS)) if _SMALL_VECTORS.value else ()
  if _DATA_DIR.value is not None:
    config.dataset.data_dir = _DATA_DIR.value
  if _MESH.value is not None:
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), cli.numbers(_MESH, 3), strict=True)))


if __name__ == "__main__":
  cli.run(main, saved="the checkpoint is as it was")
