"""Prints what a run needs, one `NAME=VALUE` a line, and checks its config, for launchers before anything is bought.

  python launch/read_config.py --config=lf_amazon_1.3m:encoder=qwen2.5-3b,images=3

The lines are `dataset`, `embedded` (whether the package contains the data set), `features` (empty if the run reads
none, or makes them itself) and `pretrained`. The flags are those of training. A config that training would refuse is
refused here, with the same one-line error.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # The checkout, whether it is installed or not.

from vixml_jax import cli, config_flag, datasets
from vixml_jax.run import configuration

_CONFIG = config_flag.define()


def main() -> None:
  """Prints the lines for the config of the flags."""
  config = cli.required(_CONFIG)
  configuration.check(config)
  print(f"dataset={config.dataset.name}")
  print(f"embedded={str((Path(datasets.__file__).parent / config.dataset.name).is_dir()).lower()}")
  print(f"features={config.features.name if config.images and not config.features.checkpoint else ''}")
  print(f"pretrained={config.encoder.pretrained}")


if __name__ == "__main__":
  cli.run(main)
