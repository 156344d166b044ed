"""What may differ when a run is continued, and which keys of two configs do."""

from collections.abc import Collection, Mapping
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.errors import InputError, shown
from vixml_jax.run.configuration.file import read
from vixml_jax.run.configuration.keys import flatten_config

# Keys, and sections with a dot at the end, that may differ when a run is continued, since they do not change what it
# computes, or by rounding only.
_FREE_KEYS = (
  "mesh.",
  "eval.",
  "checkpoint.",
  "track.",
  "profile.",
  "dataset.raw_dir",
  "dataset.data_dir",
  "dataset.allow_empty_filter",
  "features.checkpoint",
  "features.preprocessing",  # Decides how features are made. A run continues with the ones that it has.
  "fusion.bank",
  "encoder.attention",
  "encoder.pretrained",  # The folder may move: weights and tokens are compared by their hashes.
  "train.log_every_steps",
)
_ABSENT = object()


def check_same_recipe(config: ConfigDict, path: Path, left_open: Collection[str] = ()) -> None:
  """Checks that a config continues the run of a config.json; if the file does not exist, any does.

  Args:
    config: The whole config.
    path: config.json of the run.
    left_open: Keys that are not compared, because the data have not decided them yet.

  Raises:
    InputError: Keys that change the trained parameters differ. The message is one line with all of them, and the old
      and the new value of each.
  """
  if not path.exists():
    return
  old, new = (_recipe(each, left_open) for each in (read(path), config))
  if found := differences(old, new):
    raise InputError(f"{path}: this run was started with {found}; use the old values, or another --workdir")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
  """Returns the keys in which two flattened configs differ, with their values; None if they are equal.

  >>> differences({"seed": 1, "train.epochs": 3, "name": "a"}, {"seed": 1, "train.epochs": 5})
  "name='a', not absent, and train.epochs=3, not 5"
  """
  found = [
    f"{key}={_shown(old, key)}, not {_shown(new, key)}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key, _ABSENT) != new.get(key, _ABSENT)
  ]
  return ", and ".join(found) or None


def _shown(values: Mapping[str, Any], key: str) -> str:
  return shown(values[key]) if key in values else "absent"


def _recipe(config: ConfigDict, left_open: Collection[str]) -> dict[str, Any]:
  """Returns the values that must not differ, as JSON has them, where a tuple is a list."""
  values = flatten_config(ConfigDict(json.loads(json.dumps(config.to_dict()))))
  return {key: value for key, value in values.items() if not _is_free(key) and key not in left_open}


def _is_free(key: str) -> bool:
  """Returns whether a key may differ when a run is continued."""
  return key in _FREE_KEYS or any(key.startswith(section) for section in _FREE_KEYS if section.endswith("."))
