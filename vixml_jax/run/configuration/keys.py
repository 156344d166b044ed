"""The keys of a config as dotted names, such as `train.epochs`."""

from typing import Any

from ml_collections import ConfigDict


def flatten_config(config: ConfigDict) -> dict[str, Any]:
  """Returns the values of a config by their dotted keys, such as `train.epochs`."""
  return {
    (f"{key}.{inner}" if inner else key): leaf
    for key, value in config.items()
    for inner, leaf in (flatten_config(value).items() if isinstance(value, ConfigDict) else {"": value}.items())
  }
