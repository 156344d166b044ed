"""Measures the memory of a process that saves, or restores, a checkpoint of the size of LF-AmazonTitles-1.3M.

  .venv/bin/python -m benchmarks.restore_memory --part=save --folder=CHECKPOINT
  .venv/bin/python -m benchmarks.restore_memory --part=restore --folder=CHECKPOINT

The state has the bank, the centroids and the free vectors of 2,248,619 queries and 1,305,265 labels in 768 dimensions,
in float32, and an encoder of one narrow layer. The CPU is the device, so the memory of the process contains the arrays.
"""

import argparse
import dataclasses
import functools
import os
from pathlib import Path
import threading
import time

import jax
import jax.numpy as jnp

from vixml_jax import sharding
from vixml_jax.models.definition import define_model
from vixml_jax.run.checkpoint import Checkpoint, Checkpointer
from vixml_jax.run.state import abstract_state, create_state, init_params
from vixml_jax.training.optimizer import make_optimizer

_QUERIES, _LABELS, _DIM, _FREE_VECTORS = 2_248_619, 1_305_265, 768, 65_536
_GIB = 2.0**30


class _Peak:
  """The largest resident memory of this process so far, in GiB, sampled twenty times a second."""

  def __init__(self) -> None:
    self.value = 0.0
    threading.Thread(target=self._watch, daemon=True).start()

  def _watch(self) -> None:
    while True:
      pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
      self.value = max(self.value, pages * os.sysconf("SC_PAGE_SIZE") / _GIB)
      time.sleep(0.05)


@functools.partial(jax.jit, donate_argnums=0)
def _filled(array: jax.Array) -> jax.Array:
  """Returns an array of the same shape whose values do not compress; its memory is reused."""
  row, column = (jax.lax.broadcasted_iota(jnp.float32, array.shape, axis) for axis in range(2))
  return (array + jnp.sin(12.9898 * row + 78.233 * column)).astype(array.dtype)


def main() -> None:
  """Saves or restores the checkpoint and prints the memory."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--part", choices=["save", "restore"], required=True)
  parser.add_argument("--folder", type=Path, required=True, help="folder of the checkpoint")
  parser.add_argument("--scale", type=float, default=1.0, help="share of the queries and labels")
  arguments = parser.parse_args()
  peak, mesh = _Peak(), sharding.make_mesh()
  queries, labels = int(arguments.scale * _QUERIES), int(arguments.scale * _LABELS)
  encoder = dict(
    vocab_size=30_522, num_layers=1, embed_dim=_DIM, num_heads=1, mlp_dim=64, max_position=64, num_token_types=2
  )
  model = define_model(encoder, {"mlp_dim": 64}, _FREE_VECTORS)
  rates = dict.fromkeys(("learning_rate", "new_learning_rate", "free_vector_learning_rate"), 1e-4)
  optimizer = make_optimizer(model.shapes, **rates, warmup_steps=0, total_steps=100)
  abstract = abstract_state(model, optimizer, queries, labels, "float32", mesh)
  arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)) / _GIB
  with Checkpointer(arguments.folder, keep=1) as checkpointer:
    if arguments.part == "save":
      state = create_state(abstract, init_params(model, mesh, seed=0), optimizer)
      state = dataclasses.replace(state, bank=_filled(state.bank))
      state = jax.block_until_ready(dataclasses.replace(state, centroids=_filled(state.centroids)))
      started = time.monotonic()
      checkpointer.save(1, Checkpoint(state, None, {}))
      checkpointer.wait()
    else:
      started = time.monotonic()
      jax.block_until_ready(checkpointer.restore(1, abstract, queries).state)
  seconds = time.monotonic() - started
  print(
    f"{arguments.part}: {seconds:.0f} s; arrays {arrays:.2f} GiB, peak RSS {peak.value:.2f} GiB, "
    f"{peak.value - arrays:.2f} GiB above the arrays"
  )


if __name__ == "__main__":
  main()
