"""Prepares a config's data set from its raw files; does nothing where that has been done.

  python -m vixml_jax.prepare_data --config=configs/custom.py --config.dataset.raw_dir=DIR

DIR holds trn.json.gz, tst.json.gz, lbl.json.gz, filter_labels_train.txt, filter_labels_test.txt and,
if there are images, {trn,tst,lbl}_images.parquet. The prepared set goes to config.dataset.data_dir.
"""

from ml_collections import config_flags

from vixml_jax import cli
from vixml_jax.datasets import prepare
from vixml_jax.run import configuration

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; variants stand after a colon.")


def main() -> None:
  """Prepares the data set of the config that the flags name."""
  config = cli.required(_CONFIG)
  configuration.check(config)
  prepare(config.dataset.name, config.dataset.raw_dir, config.dataset.data_dir)


if __name__ == "__main__":
  cli.run(main)
