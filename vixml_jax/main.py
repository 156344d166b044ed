"""Trains a model and evaluates it.

  python -m vixml_jax.main --config=configs/quickstart.py [--workdir=runs/NAME] [--config.train.epochs=3 ...]
  python -m vixml_jax.main --data=products.csv [--config=configs/custom.py] [--workdir=runs/NAME]
  python -m vixml_jax.main --config=configs/quickstart.py --profile=30:32

If the data set is not prepared yet, it is prepared first. If the model reads images and config.features.checkpoint is
set, missing image features are extracted. If the workdir contains a checkpoint, training continues from the newest one.
The workdir receives config.json, metrics.jsonl, checkpoints/, final_metrics.json, report.html and the files that
predict and serve need.
"""

from absl import flags

from vixml_jax import cli, compile_cache_flag, config_flag, data_flags
from vixml_jax.errors import InputError

_CONFIG = config_flag.define()
_DATA = data_flags.define_data_flags()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for the outputs, or its URL in a bucket; default: runs/NAME, where NAME is config.name."
)
_PROFILE = flags.DEFINE_string(
  "profile",
  None,
  "FIRST:LAST, the training steps of which a trace is written to the folder profile of the workdir, for XProf and "
  "TensorBoard; the same as --config.profile.steps.",
)
_COMPILE_CACHE = compile_cache_flag.define()


def main() -> None:
  """Trains and evaluates the config of the flags."""
  from vixml_jax.experiment import train_and_evaluate
  from vixml_jax.run import configuration
  from vixml_jax.run.bucket_workdir import open_workdir

  config = cli.required(_CONFIG)
  if _PROFILE.value is not None:
    if config.profile.steps not in ("", _PROFILE.value):
      raise InputError("--profile and --config.profile.steps: both name the steps to trace; give one of them")
    config.profile.steps = _PROFILE.value
  configuration.check(config)
  compile_cache_flag.use(_COMPILE_CACHE)
  with open_workdir(cli.place(_WORKDIR.value or f"runs/{config.name}", "workdir")) as workdir:
    _DATA.set_raw_dir(config, workdir.folder)
    train_and_evaluate(config, workdir.folder, cli.show, workdir.saved)


if __name__ == "__main__":
  cli.run(main, data_flags.with_default_config, saved="nothing is trained yet")
