"""Measures how many items a second are packed into rows, for lengths like those of titles.

  .venv/bin/python -m benchmarks.packing [--row_length=128] [--rounds=20]

The lengths are random: mean 15, at most 32. One thread packs. The fastest round counts; the processor seconds of the
thread are reported besides, since they do not depend on other work on the machine.
"""

import argparse
import time

import numpy as np

from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.ragged import Ragged

_CASES = ((2_048, 0), (65_536, 0), (65_536, 3))


def random_items(count: int, images: int) -> Items:
  """Returns items with texts of 3 to 32 tokens, 15 on average, and at most `images` images."""
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.normal(15, 6, count).astype(int), 3, 32)
  texts = Ragged.of_lengths(rng.integers(1, 30_000, lengths.sum(), np.int32), lengths)
  numbers = rng.integers(0, images + 1, count)
  return Items(texts, Ragged.of_lengths(rng.integers(0, 1_000, numbers.sum(), np.int32), numbers))


def main() -> None:
  """Prints a row for each number of items and of images."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--row_length", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=20)
  arguments = parser.parse_args()
  print("| items | images | items/s | items per processor second | padding |")
  print("|---:|---:|---:|---:|---:|")
  for count, images in _CASES:
    items, layout = random_items(count, images), PackedLayout(arguments.row_length, 1, images)
    seconds, processor = [], []
    for _ in range(arguments.rounds):
      started = time.perf_counter(), time.thread_time()
      packed = pack(items, layout, round_up=False)
      seconds.append(time.perf_counter() - started[0])
      processor.append(time.thread_time() - started[1])
    padding = 1 - packed.num_tokens / packed.tokens.size
    rates = (f"{count / min(taken):,.0f}" for taken in (seconds, processor))
    print(f"| {count:,} | {images} | {' | '.join(rates)} | {padding:.1%} |", flush=True)


if __name__ == "__main__":
  main()
