"""Few items get rows and chunks with few empty places, and all programs are known beforehand."""

import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.inference.small_shapes import SmallShapes
from vixml_jax.input.best_fit import assign_rows
from vixml_jax.input.packing import PackedLayout

_LAYOUT = PackedLayout(row_length=48, chunk_rows=21)


@pytest.fixture(scope="module")
def shapes():
  return SmallShapes(_LAYOUT, sharding.make_mesh(devices=sharding.make_mesh().devices.flat[:1]))


def _rows(lengths, layout):
  return int(assign_rows(lengths, layout.row_length, layout.slots).rows.max()) + 1


@pytest.mark.parametrize(
  "lengths,row_length",
  [
    ([7], 8),
    ([4, 4], 8),
    ([9], 16),
    ([9, 7], 16),
    ([5] * 9, 16),  # Three of them fill a row but for one token.
    ([9] * 9, 48),  # One in 16 tokens, but five in 48.
    ([17, 15], 32),
    ([17, 16], 48),
    ([48], 48),
    ([3] * 3, 16),  # A row of 8 tokens has two places.
  ],
)
def test_the_row_length_suits_the_lengths(shapes, lengths, row_length):
  assert shapes.choose(np.array(lengths)).layout.row_length == row_length


def test_every_batch_runs_a_program_of_the_list_and_wastes_little(shapes):
  rng, known = np.random.default_rng(0), set(shapes.all(64))
  wasted = []
  for _ in range(300):
    lengths = rng.integers(3, rng.integers(4, 49), rng.integers(1, 65))
    shape = shapes.choose(lengths)
    rows = _rows(lengths, shape.layout)
    layout = shape.with_chunks(rows)
    assert layout in known
    wasted.append(-(-rows // layout.chunk_rows) * layout.chunk_rows * layout.row_length / lengths.sum())
  assert np.mean(wasted) < 1.35 and len(known) <= 18


def test_few_items_need_few_programs(shapes):
  assert {layout.chunk_rows for layout in shapes.all(2)} == {1, 2}
