"""Finds config files by name or path, and loads them.

The configs of this package are the folder `configs/` of the repository, which the wheel contains as
`vixml_jax/configs`. They are files that are run, as those of users are; the package never imports them.
"""

from collections.abc import Iterator, Mapping
import contextlib
import difflib
import functools
import importlib.machinery
import importlib.util
from pathlib import Path
import re
import sys
from typing import Any

from ml_collections import ConfigDict

import vixml_jax
from vixml_jax.errors import InputError, shown

_PACKAGE = Path(vixml_jax.__file__).parent


def configs_folder() -> Path:
  """Returns the folder of the configs: in the package if it was installed from a wheel, otherwise beside it."""
  installed = _PACKAGE / "configs"
  return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def config_names() -> list[str]:
  """Returns the names of the configs, such as `quickstart`; files that define no config are left out."""
  files = sorted(configs_folder().glob("*.py"))
  return [path.stem for path in files if re.search(r"^def get_config\(", path.read_text("utf-8"), re.MULTILINE)]


def config_path(name_or_path: str) -> Path:
  """Returns the file of a config.

  Args:
    name_or_path: A name such as `quickstart`, or a path that ends in `.py` or contains a slash. A variant may follow
      after a colon.

  Raises:
    InputError: There is no such config. The message lists the names.
  """
  name, _ = _split(name_or_path)
  names = config_names()
  if name in names:
    return configs_folder() / f"{name}.py"
  if "/" not in name and not name.endswith(".py"):
    problem, near = f"there is no config {name!r}", difflib.get_close_matches(name, names, 1)
  elif not Path(name).is_file():
    problem, near = f"there is no file {name}", difflib.get_close_matches(Path(name).stem, names, 1)
  else:
    return Path(name)
  hint = f"did you mean {near[0]}? " if near else ""
  raise InputError(f"{problem}; {hint}give a path, or one of the names {', '.join(names)}")


def _split(argument: str) -> tuple[str, str]:
  """Splits `FILE:VARIANT`; the second part is empty, or starts with the colon."""
  name, colon, variant = argument.partition(":")
  return name, colon + variant


def resolve(argument: str) -> str:
  """Returns `--config`'s argument with the path of the config instead of its name, and the same variant.

  Raises:
    InputError: There is no such config.
  """
  return f"{config_path(argument)}{_split(argument)[1]}"


@contextlib.contextmanager
def configs_importable(path: Path) -> Iterator[None]:
  """While it is open, a config file can import others by `from configs import common`.

  `configs` then is a package of the files in `configs_folder()`. If the folder of the config file is also called
  `configs`, its files come first. No package of this name is installed, since it would collide with those of others; a
  package of this name that the caller has imported is the same afterwards.

  Args:
    path: The config file.
  """
  folders = [path.absolute().parent] if path.absolute().parent.name == "configs" else []
  spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
  spec.submodule_search_locations = [str(folder) for folder in dict.fromkeys([*folders, configs_folder()])]
  others = _take_modules()
  sys.modules["configs"] = importlib.util.module_from_spec(spec)
  try:
    yield
  finally:
    _take_modules()
    sys.modules.update(others)


def _take_modules() -> dict[str, Any]:
  """Removes the package `configs` from the imported modules, and returns what was removed."""
  names = [name for name in sys.modules if name.partition(".")[0] == "configs"]
  return {name: sys.modules.pop(name) for name in names}


def load(name: str, /, **overrides: Any) -> ConfigDict:
  """Returns the config with a name, locked.

  Args:
    name: A name such as `quickstart:images=3`, or the path of a config file, with a variant after the colon.
    **overrides: Values by their dotted keys, as in `load("custom", **{"train.epochs": 3})`.

  Raises:
    InputError: There is no such config, variant or key, or a value has the wrong type.
  """
  path, variant = config_path(name), _split(name)[1].removeprefix(":")
  spec = importlib.util.spec_from_file_location("loaded_config", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  with configs_importable(path):
    try:
      spec.loader.exec_module(module)
      config = module.get_config(*filter(None, [variant]))
    except (ValueError, SyntaxError, ImportError) as error:
      raise InputError(f"{name}: {error}") from error
  return with_overrides(config, overrides)


def with_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """Returns a locked copy of a config with other values.

  Args:
    config: The config, which is not changed.
    overrides: Values by their dotted keys, such as `train.epochs`.

  Raises:
    InputError: There is no such key, or a value has the wrong type.
  """
  config = config.copy_and_resolve_references()
  config.lock()
  for key, value in overrides.items():
    try:
      if isinstance(value, bool) and isinstance(_former(config, key), float):
        raise TypeError  # Otherwise True would become 1.0.
      config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError) as error:
      near = re.search(r'Did you mean "(\w+)"', str(error))
      advice = f"did you mean {near[1]}?" if near else "see configs/common.py"
      raise InputError(f"config.{key}: there is no such key; {advice}") from error
    except (TypeError, ValueError, OverflowError) as error:
      former = _former(config, key)
      wanted = "a section, so set one of its keys" if isinstance(former, ConfigDict) else type(former).__name__
      raise InputError(f"config.{key}={shown(value)}: must be {wanted}, not {type(value).__name__}") from error
  return config


def _former(config: ConfigDict, key: str) -> Any:
  """Returns the value that a config has for a dotted key."""
  return functools.reduce(lambda section, part: section[part], key.split("."), config)
