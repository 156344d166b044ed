"""Amounts that requests share, such as bytes or pixels: in all, and of each client."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
import contextlib
import functools
import ipaddress

from starlette.types import Scope

_KEY = "vixml_jax.share"


class Budget:
  """An amount of which requests take parts, and give them back. It belongs to one event loop.

  Attributes:
    taken: What requests have taken.
  """

  def __init__(self, total: int, per_client: int):
    """Takes what there is in all, and what the requests of one client may take together."""
    self.taken = 0
    self._total, self._per_client = total, per_client
    self._of_client: Counter[str] = Counter()
    self._returned = asyncio.Event()

  def take(self, client: str, amount: int) -> bool:
    """Takes an amount for a client, or returns False if that would be too much."""
    if self.taken + amount > self._total or self._of_client[client] + amount > self._per_client:
      return False
    self.taken += amount
    self._of_client[client] += amount
    return True

  def give(self, client: str, amount: int) -> None:
    """Gives an amount back."""
    self.taken -= amount
    self._of_client[client] -= amount
    if not self._of_client[client]:
      del self._of_client[client]  # Otherwise the addresses of all clients would be kept.
    self._returned.set()
    self._returned = asyncio.Event()

  @contextlib.asynccontextmanager
  async def wait_for(self, client: str, amount: int) -> AsyncIterator[Callable[[Future], None]]:
    """Waits until an amount can be taken, and gives it back when the block ends.

    Yields:
      A function that takes a job of another thread. The amount is kept until the job has ended, if that is later.
    """
    while not self.take(client, amount):
      await self._returned.wait()
    jobs: list[Future] = []
    try:
      yield jobs.append
    finally:
      loop, running = asyncio.get_running_loop(), [job for job in jobs if not job.cancel() and not job.done()]
      if running:  # Jobs follow each other, so there is only one.
        running[0].add_done_callback(lambda _: loop.call_soon_threadsafe(self.give, client, amount))
      else:
        self.give(client, amount)


class Share:
  """What one request has taken from a budget; it may grow while the request arrives.

  Attributes:
    client: Name of the client.
  """

  def __init__(self, budget: Budget, client: str):
    self.client = client
    self._budget, self._amount = budget, 0

  @classmethod
  def begin(cls, scope: Scope, budget: Budget) -> "Share":
    """Returns an empty share for a request, and stores it in its scope."""
    address = scope["client"][0] if scope.get("client") else ""
    scope[_KEY] = share = cls(budget, client_name(address))
    return share

  @staticmethod
  def of(scope: Scope) -> "Share":
    """Returns the share that `begin` stored."""
    return scope[_KEY]

  def resize(self, amount: int) -> bool:
    """Takes or gives back what is missing to an amount, or returns False if that would be too much."""
    if amount > self._amount:
      if not self._budget.take(self.client, amount - self._amount):
        return False
    elif amount < self._amount:
      self._budget.give(self.client, self._amount - amount)
    self._amount = amount
    return True


@functools.lru_cache(maxsize=4_096)
def client_name(address: str) -> str:
  """Returns what identifies a client: its IPv4 address, or the network of its IPv6 address, which it owns as a whole.

  >>> client_name("2001:db8:1:2:3:4:5:6"), client_name("10.0.0.1")
  ('2001:db8:1:2::/64', '10.0.0.1')
  """
  try:
    parsed = ipaddress.ip_address(address.partition("%")[0])
  except ValueError:  # What a proxy writes.
    return address
  if parsed.version == 4:
    return str(parsed)
  return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
