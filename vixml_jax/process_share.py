"""The share of one process in work that several processes divide among them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ProcessShare:
  """One of several processes that divide numbered pieces of work. They may be started and stopped independently.

  A piece belongs to the same process whenever the processes start, so they need not talk to each other. If they are
  started again in another number, every piece still belongs to exactly one of them.

  >>> [number for number in range(7) if ProcessShare(1, 3).has(number)]
  [1, 4]

  Attributes:
    index: Number of this process, from 0.
    count: Number of processes.
    joined: Whether `jax.distributed` joins the processes. They then have to end together.
  """

  index: int = 0
  count: int = 1
  joined: bool = False

  def has(self, number: int) -> bool:
    """Returns whether a piece of work belongs to this process."""
    return number % self.count == self.index


def joined_share() -> ProcessShare:
  """Returns the share of this process among those that `jax.distributed` joins; the whole work without it."""
  import jax  # Late, because `cli` imports this module, and `--help` needs no JAX.

  return ProcessShare(jax.process_index(), jax.process_count(), jax.process_count() > 1)
