"""Log lines about long stages of a run: what starts, what has ended, how long it took, memory of host and devices."""

from collections.abc import Iterator
import contextlib
import logging
import resource
import sys
import time

import jax

LONG = 100_000
"""Number of rows from which on a stage between epochs takes long enough to be of interest."""

_log = logging.getLogger(__name__)
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # The unit of `ru_maxrss`.


@contextlib.contextmanager
def stage(name: str, *, shown: bool = True) -> Iterator[None]:
  """Logs a line when a stage starts, and one with its time and the memory in use when it has ended.

  The line of the end is not logged if the stage fails.

  Args:
    name: What is done, such as "encode 294,805 training queries".
    shown: Whether to log anything; False for stages that are too short to be of interest.
  """
  if not shown:
    yield
    return
  started = time.monotonic()
  _log.info("%s", name)
  yield
  _log.info(
    "%s: done in %.1f s; memory of the process: %.2f GiB at most so far; arrays on its devices: %.2f GiB",
    name,
    time.monotonic() - started,
    peak_memory() / 2**30,
    device_bytes() / 2**30,
  )


def peak_memory() -> int:
  """Returns the largest resident memory of this process so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES


def device_bytes() -> int:
  """Returns the bytes of all arrays on the devices of this process. Arrays that share a buffer count once."""
  shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
  return sum({(shard.device, shard.unsafe_buffer_pointer()): shard.nbytes for shard in shards}.values())
