"""The statistics of `predict` are of whole blocks without the first one, which compiles."""

import pytest

from vixml_jax.inference import block_timings
from vixml_jax.inference.block_timings import BlockTimings


@pytest.fixture
def clock(monkeypatch):
  """Returns a function that sets the clock to a number of seconds."""
  now = [0.0]
  monkeypatch.setattr(block_timings.time, "perf_counter", lambda: now[0])
  return lambda seconds: now.__setitem__(0, seconds)


def test_the_first_block_and_a_smaller_last_one_are_not_among_the_others(clock):
  timings = BlockTimings()
  for end, duration, queries in ((10.0, 10.0, 4), (11.0, 1.0, 4), (14.0, 3.0, 4), (20.0, 6.0, 2)):
    clock(end)
    timings.add(end - duration, queries)
  assert timings.summary() == {
    "first_block": {"ms": 10_000.0, "queries_per_second": pytest.approx(0.4)},
    "p50_ms": 2_000.0,
    "p99_ms": pytest.approx(2_980.0),
    "queries_per_second": pytest.approx(8 / 4),
  }


def test_a_single_block_has_no_rate_without_compilation(clock):
  timings = BlockTimings()
  assert timings.summary() is None
  clock(2.0)
  timings.add(0.0, 3)
  summary = timings.summary()
  assert summary["p50_ms"] is summary["p99_ms"] is summary["queries_per_second"] is None
  line = block_timings.describe("encode", summary, 4096)
  assert line == "encode: first batch 2000.0 ms with compilation, 1.5 queries/s"
