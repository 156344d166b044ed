"""Checks the flags of a command, and prints what it needs, for launchers before anything is bought.

  python launch/read_config.py train --config=lf_amazon_1.3m:encoder=qwen2.5-3b,images=3
  python launch/read_config.py predict --workdir=W --queries=Q --output=O < W/config.json

What is printed has the form `NAME=VALUE`, one a line: `dataset`, `embedded` (whether the package contains the data
set), `features` (empty if the run reads none, or makes them itself), `pretrained`, and `frozen` (whether the encoder is
read again after training, because it is in no checkpoint). They are those of the config in the flags. Commands without
such a flag read the config of a run on the standard input; if that is empty, they print nothing. Flags and configs that
the command would refuse are refused here, with the same one-line error.
"""

import importlib
from pathlib import Path
import sys
import tempfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # The checkout, whether it is installed or not.

from absl import flags
from ml_collections import ConfigDict

from vixml_jax import cli, datasets
from vixml_jax.__main__ import MODULES
from vixml_jax.errors import InputError
from vixml_jax.run import configuration
from vixml_jax.run.workdir import CONFIG


def main() -> None:
  """Prints the lines for the config of the flags, or for that of the standard input."""
  config = _config_of_flags() if "config" in flags.FLAGS else _stored_config()
  if config is None:
    return
  print(f"dataset={config.dataset.name}")
  print(f"embedded={str((Path(datasets.__file__).parent / config.dataset.name).is_dir()).lower()}")
  print(f"features={config.features.name if config.images and not config.features.checkpoint else ''}")
  print(f"pretrained={config.encoder.pretrained}")
  print(f"frozen={str(bool(config.encoder.get('lora_rank') and not config.encoder.random_init)).lower()}")


def _config_of_flags() -> ConfigDict:
  config = cli.required(flags.FlagHolder(flags.FLAGS, flags.FLAGS["config"]))
  configuration.check(config)
  return config


def _stored_config() -> ConfigDict | None:
  """Returns the config.json on the standard input; None if that is empty."""
  text = sys.stdin.read()
  if not text.strip():
    return None
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / CONFIG
    path.write_text(text, "utf-8")
    try:
      return configuration.read(path)
    except InputError as error:
      raise InputError(str(error).replace(str(path), f"{CONFIG} of the run")) from None


if __name__ == "__main__":
  # The entry point defines its flags when it is imported; `cli.run` parses them.
  importlib.import_module(f"vixml_jax.{MODULES[sys.argv.pop(1)]}")
  cli.run(main, divides=True)
