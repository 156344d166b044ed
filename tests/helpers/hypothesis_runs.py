"""Runs a check on examples that hypothesis draws: the same few in every run of the tests, many in slow ones."""

from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
import pytest


def few_and_many(few: int, many: int) -> pytest.MarkDecorator:
  """Parametrizes a test with the number of examples; the larger number is a slow test."""
  return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def for_all(cases: SearchStrategy, examples: int, check: Callable[[object], None]) -> None:
  """Calls `check` with so many cases; the first that fails is reduced and raised again."""
  limits = settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
  )
  limits(given(cases)(check))()
