"""Files of weights give the tower that was written, or are refused with one line; nothing is allocated by a header."""

import functools
from pathlib import Path
import tempfile
import tracemalloc

import jax
import numpy as np
import pytest

from tests.bad_input import campaign, weights
from tests.bad_input.campaign import Refused
from vixml_jax.models.vision import define_vision
from vixml_jax.weights import vision

_ALLOCATED = 64 * 2**20  # Bytes. The tower has 6 KB; the largest header that safetensors reads takes some megabytes.


@functools.cache
def _define(items):
  return define_vision(dict(items))


@pytest.fixture(autouse=True)
def structures_are_defined_once(monkeypatch):
  """JAX takes most of the time to find the shapes of a tower, which every case needs."""
  monkeypatch.setattr(vision, "define_vision", lambda arguments: _define(tuple(arguments.items())))


def _load(path):
  """Loads a tower, and checks what numpy allocated: pages that are never touched do not count as memory."""
  tracemalloc.start()
  try:
    return vision.load_tower(path)[0]
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < _ALLOCATED, peak


def _check(tally, case):
  given, expected = case
  with tempfile.TemporaryDirectory() as place:
    for name, content in given.files.items():
      (Path(place) / name).write_bytes(content)
    found = tally.attempt(lambda: _load(f"{place}/{given.path}"))
  if isinstance(found, Refused):
    tally.judge(found, expected)
    return
  assert expected.value is not None, "accepted"
  if expected.value is weights.TOWER:
    jax.tree.map(np.testing.assert_array_equal, found, weights.TOWER)


@campaign.examples_of_each(60)
def test_weights(each, record_property):
  campaign.run("files of weights", weights.MUTATIONS, _check, each, record_property)
