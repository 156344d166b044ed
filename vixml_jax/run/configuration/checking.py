"""Checks that a config has exactly the known keys, each with a value in its range, and that the values fit together."""

import difflib
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.errors import InputError, shown
from vixml_jax.run.configuration.combinations import check_combinations
from vixml_jax.run.configuration.keys import flatten_config
from vixml_jax.run.configuration.ranges import OF_ARCHITECTURES, RANGES, rule_of
from vixml_jax.run.configuration.rules import ValueRule

_ARCHITECTURE = "encoder.architecture"


def check(config: ConfigDict) -> None:
  """Checks all keys and values of a config.

  Raises:
    InputError: A key is missing or unknown, a value is out of its range, or values do not fit together. The message is
      one line with the key, its value, shortened, and what is allowed.
  """
  values = flatten_config(config)
  _check_value(_ARCHITECTURE, values, RANGES[_ARCHITECTURE])
  rules = RANGES | OF_ARCHITECTURES[values[_ARCHITECTURE]]
  for key, rule in rules.items():
    _check_value(key, values, rule)
  for key in values.keys() - rules.keys():
    rule_of_section = rule_of(key, values[_ARCHITECTURE])
    if rule_of_section is None:
      near = difflib.get_close_matches(key, rules, 1)
      advice = f"did you mean {near[0]}?" if near else "see configs/common.py"
      raise InputError(f"config.{shown(key)[1:-1]}={shown(values[key])}: there is no such key; {advice}")
    _check_value(key, values, rule_of_section)
  check_combinations(values)


def _check_value(key: str, values: dict[str, Any], rule: ValueRule) -> None:
  """Checks that a key exists, and that its value has its range."""
  if key not in values:
    sections = key.split(".")[:-1]
    above = next((name for name in (".".join(sections[:n]) for n in range(1, len(sections) + 1)) if name in values), "")
    if above:
      raise InputError(f"config.{above}={shown(values[above])}: must be a section with keys such as {key}")
    if any(other.startswith(f"{key}.") for other in values):
      raise InputError(f"config.{key}: is a section, and must be {rule.allowed}")
    raise InputError(f"config.{key}: is missing; start from configs/common.py")
  if not rule.accepts(values[key]):
    raise InputError(f"config.{shown(key)[1:-1]}={shown(values[key])}: must be {rule.allowed}")
