"""Counts the programs that JAX compiles."""

from collections.abc import Iterator
import contextlib

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
  """Yields a list that grows by one entry for each program compiled within the block."""
  events: list[str] = []
  listen = lambda event, *_, **__: events.append(event) if event == _COMPILED else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
