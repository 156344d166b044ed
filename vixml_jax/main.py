"""Trains a model and evaluates it.

  python -m vixml_jax.main --config=configs/quickstart.py [--workdir=runs/NAME] [--config.train.epochs=3 ...]

Prepares the data set where it is missing, and image features where config.images asks for them and
config.features.checkpoint names a tower. Goes on from the newest checkpoint in the workdir if there is
one, and writes config.json, metrics.jsonl, final_metrics.json and checkpoints/ there.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vixml_jax import cli
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.run import configuration

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; variants stand after a colon.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where outputs go; by default runs/ and the config's name.")


def main() -> None:
  """Trains and evaluates the config that the flags name."""
  config = cli.required(_CONFIG)
  configuration.check(config)
  train_and_evaluate(config, Path(_WORKDIR.value or f"runs/{config.name}"))


if __name__ == "__main__":
  cli.run(main)
