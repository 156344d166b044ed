"""Prepares the data set of a config from its raw files, if that has not been done.

  python -m vixml_jax.prepare_data --config=configs/custom.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.prepare_data --data=products.csv

DIR has the published archives (.zip or .tar.gz, as downloaded or unpacked), or the files trn.json.gz, tst.json.gz,
lbl.json.gz and, if there are any, filter_labels_{train,test}.txt and {trn,tst,lbl}_images.parquet. docs/data.md
describes all formats. The prepared data set is written to config.dataset.data_dir. Both may be URLs of buckets.
"""

from vixml_jax import cli, config_flag, data_flags

_CONFIG = config_flag.define()
_DATA = data_flags.define_data_flags()


def main() -> None:
  """Prepares the data set of the config in the flags."""
  from vixml_jax.datasets.bucket_sets import prepare_shared
  from vixml_jax.run import configuration

  config = cli.required(_CONFIG)
  configuration.check(config)
  _DATA.set_raw_dir(config)
  data = config.dataset
  prepare_shared(data.name, data.raw_dir, data.data_dir, data.allow_empty_filter)


if __name__ == "__main__":
  cli.run(main, data_flags.with_default_config, saved="a data set that is not complete is not saved")
