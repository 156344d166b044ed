"""Configs: the range of every key, the check of all values, the file of a run, and continuing a run with it."""

from vixml_jax.run.configuration.checking import check
from vixml_jax.run.configuration.continuing import check_same_recipe, differences
from vixml_jax.run.configuration.file import read, write
from vixml_jax.run.configuration.keys import flatten_config

__all__ = ["check", "check_same_recipe", "differences", "flatten_config", "read", "write"]
