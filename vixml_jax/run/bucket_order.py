"""The order in which the files of a workdir are copied from and to a bucket, so that a kill leaves only whole parts."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from vixml_jax.manifest import MANIFEST
from vixml_jax.run.workdir import INDEX, INFERENCE_INFO
from vixml_jax.search import snapshots

_THREADS = 8


def rank_of(name: str) -> int:
  """Returns when a file is copied: files with hashes after those that they describe."""
  if name.endswith(f"/{MANIFEST}"):
    return 1
  return 2 if name in (f"{INDEX}/{snapshots.CURRENT}", INFERENCE_INFO) else 0


def copy_in_order(names: Iterable[str], do: Callable[[str], object], rank: Callable[[str], int] = rank_of) -> None:
  """Does something with files in threads, rank after rank. After an error, nothing more is begun."""
  names = sorted(names)
  for number in range(3):
    with ThreadPoolExecutor(_THREADS, "bucket") as threads:
      calls = [threads.submit(do, name) for name in names if rank(name) == number]
      try:
        wait(calls, return_when=FIRST_EXCEPTION)
      finally:
        threads.shutdown(cancel_futures=True)
    for call in calls:
      if not call.cancelled():
        call.result()
