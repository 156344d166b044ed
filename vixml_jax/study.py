"""Runs a study: a named grid of runs that differ in a few keys, with several seeds, and one table of their results.

  python -m vixml_jax.study --study=NAME --config=configs/quickstart.py:images=3 [--seeds=3] [--shard=0/2]
      [--split=validation|test] [--output=runs/studies/NAME] [--config.train.epochs=2 ...]

Studies: mining (margins, negatives, cluster size, start, interval), prompts (every order of the parts of an item),
images (0 to 5 in training and in tests), adapters, attention (of decoders), fusion, methods, encoders, seeds. Each run
has a workdir in the output folder. The same command continues a study that was stopped. Several machines share one by
--shard=i/n and a common folder; afterwards, the command without --shard writes the table. Choose on the validation
split, and add --split=test once: it evaluates the trained runs again. Writes study-SPLIT.json and study-SPLIT.html.
"""

import re

from absl import flags

from vixml_jax import cli, compile_cache_flag, config_flag
from vixml_jax.errors import InputError
from vixml_jax.studies.grids import STUDIES

_CONFIG = config_flag.define()
_STUDY = flags.DEFINE_enum("study", None, list(STUDIES), "What is varied.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each run, from config.seed on.", lower_bound=1)
_SHARD = flags.DEFINE_string("shard", "0/1", "Which part of the runs this process trains: i/n, with i from 0 to n - 1.")
_SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "test"], "Queries to evaluate.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the study; default: runs/studies/NAME of study and config.")
_COMPILE_CACHE = compile_cache_flag.define()


def main() -> None:
  """Runs the study of the flags, and prints its table."""
  from vixml_jax.studies.comparison import compare_cells, comparison_table, write_comparison
  from vixml_jax.studies.run_study import plan_study, run_study

  study, config, shard = cli.required(_STUDY), cli.required(_CONFIG), _shard(_SHARD.value)
  folder = cli.local_path(_OUTPUT.value or f"runs/studies/{study}-{config.name}", "output")
  runs = plan_study(study, config, _SEEDS.value, _SPLIT.value, folder)
  compile_cache_flag.use(_COMPILE_CACHE)
  run_study(runs, shard, cli.show)
  results = compare_cells(runs)
  write_comparison(folder, study, _SPLIT.value, results)
  cli.show(comparison_table(results))


def _shard(text: str) -> tuple[int, int]:
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if match is None or int(match[1]) >= int(match[2]):
    raise InputError(f"--shard={text}: must be i/n, with i from 0 to n - 1, such as 0/2")
  return int(match[1]), int(match[2])


if __name__ == "__main__":
  cli.run(main, saved="finished runs are saved")
