"""Times of the blocks of queries of `predict`: the first block, which compiles, apart from the others.

The last block often has fewer queries, for which another program may be compiled. It is left out as well.
"""

import time
from typing import Any

import numpy as np


class BlockTimings:
  """Durations of consecutive blocks of queries, of which the first one includes compilation."""

  def __init__(self) -> None:
    """Starts without blocks."""
    self._seconds: list[float] = []
    self._queries: list[int] = []

  def add(self, started: float, queries: int) -> None:
    """Adds a block that ends now.

    Args:
      started: `time.perf_counter()` when the block started.
      queries: Its number of queries.
    """
    self._seconds.append(time.perf_counter() - started)
    self._queries.append(queries)

  def summary(self) -> dict[str, Any] | None:
    """Returns the statistics as JSON; None if there are no blocks.

    `first_block` has milliseconds and queries per second of the first block. `p50_ms`, `p99_ms` and
    `queries_per_second` are of the other blocks with as many queries, and None if there are none.
    """
    if not self._seconds:
      return None
    milliseconds = 1000 * np.array(self._seconds)
    rates = np.array(self._queries) / milliseconds * 1000
    whole = np.array(self._queries) == self._queries[0]
    others = milliseconds[1:][whole[1:]]
    return {
      "first_block": {"ms": float(milliseconds[0]), "queries_per_second": float(rates[0])},
      "p50_ms": float(np.percentile(others, 50)) if others.size else None,
      "p99_ms": float(np.percentile(others, 99)) if others.size else None,
      "queries_per_second": 1000 * self._queries[0] * others.size / float(others.sum()) if others.size else None,
    }


def describe(what: str, summary: dict[str, Any], batch_size: int) -> str:
  """Returns a line about what `BlockTimings.summary` returned.

  Args:
    what: What the blocks were timed for, such as "encode".
    summary: The statistics.
    batch_size: Number of queries in a block.
  """
  first = "{ms:.1f} ms with compilation, {queries_per_second:,.1f} queries/s".format(**summary["first_block"])
  if summary["p50_ms"] is None:
    return f"{what}: first batch {first}"
  return (
    "{}: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms per batch of {}; {queries_per_second:,.0f} queries/s; first batch {}"
  ).format(what, batch_size, first, **summary)
