"""The flag `--config` of the entry points that read a config.

An entry point calls `define` when it is imported. absl lists the flag in its `--help`, because this module disclaims
it.
"""

from absl import flags
from ml_collections import ConfigDict, config_flags

from vixml_jax.run import named_configs

flags.disclaim_key_flags()


class _NamedConfigParser(flags.ArgumentParser):
  """Parses names of configs as well as paths, and lets config files import each other."""

  def __init__(self, of_files: flags.ArgumentParser):
    self._of_files = of_files

  def parse(self, argument: str) -> ConfigDict:
    resolved = named_configs.resolve(argument)
    with named_configs.configs_importable(named_configs.config_path(argument)):
      return self._of_files.parse(resolved)

  def flag_type(self) -> str:
    return self._of_files.flag_type()


def define() -> flags.FlagHolder[ConfigDict]:
  """Defines `--config`, whose keys are flags as well: `--config=quickstart:images=3 --config.train.epochs=3`."""
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Name of a config, or a config file; a variant follows after a colon: quickstart:images=3. Each of its keys is a "
    "flag as well: --config.train.epochs=3.",
  )
  flag = flags.FLAGS["config"]
  flag.parser = _NamedConfigParser(flag.parser)
  return holder
