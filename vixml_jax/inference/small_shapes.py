"""Shapes of the programs that encode few items: short rows for short items, and chunks with few empty rows."""

from collections.abc import Iterator
import dataclasses
from typing import NamedTuple

from jax.sharding import Mesh
import numpy as np

from vixml_jax import sharding
from vixml_jax.input.packing import PackedLayout

_SINGLE_ROWS = (16, 32)  # Numbers of tokens.
_CPU_SINGLE_ROWS = (8, 16, 32)
_CPU_SHORT_ROW, _CPU_SHORT_SIZES = 16, (1, 2, 3, 4, 5, 6, 8, 10, 12)
_MOST_EMPTY = 1.15  # Short rows may have this many times the tokens of long rows. Their attention costs less.


class SmallShape(NamedTuple):
  """Rows of one length, and how many of them a program may encode.

  Attributes:
    layout: Layout with `chunk_rows` 1.
    sizes: Numbers of rows, ascending.
  """

  layout: PackedLayout
  sizes: tuple[int, ...]

  def with_chunks(self, rows: int) -> PackedLayout:
    """Returns the layout with chunks for `rows` rows: one of just enough rows, or equal ones with few empty rows."""
    # A chunk itself costs as much as a row.
    size = min(self.sizes, key=lambda size: -(-rows // size) * (size + 1))
    return dataclasses.replace(self.layout, chunk_rows=size)


class SmallShapes:
  """The shapes for few items. Each number of rows of each shape compiles a program, so there are few."""

  def __init__(self, layout: PackedLayout, mesh: Mesh):
    """Takes the layout of many items, and the devices, which divide its chunks."""
    unit = sharding.row_devices(mesh)
    is_cpu = mesh.size == 1 and sharding.platform_of(mesh) == "cpu"

    def shape(row_length: int, sizes: tuple[int, ...]) -> SmallShape:
      return SmallShape(dataclasses.replace(layout, row_length=row_length, chunk_rows=1), sizes)

    lengths = _CPU_SINGLE_ROWS if is_cpu else _SINGLE_ROWS
    self._single = [shape(length, (unit,)) for length in lengths if length < layout.row_length]
    self._short = shape(_CPU_SHORT_ROW, _CPU_SHORT_SIZES) if is_cpu and layout.row_length > _CPU_SHORT_ROW else None
    self._long = shape(layout.row_length, _sizes(unit, layout.chunk_rows))

  def choose(self, lengths: np.ndarray) -> SmallShape:
    """Returns the shape for items of the given numbers of tokens, int [items]."""
    for single in self._single:
      if lengths.sum() <= single.layout.row_length and len(lengths) <= single.layout.slots:
        return single
    if self._short is None or lengths.max(initial=0) > self._short.layout.row_length:
      return self._long
    short, long = (_estimated_tokens(lengths, shape.layout.row_length) for shape in (self._short, self._long))
    return self._short if short <= _MOST_EMPTY * long else self._long

  def all(self, items: int) -> Iterator[PackedLayout]:
    """Yields the layouts that up to `items` items need, each with the number of rows of a program.

    A row has at least one item, so that no more rows than items are needed.
    """
    shapes = [shape for shape in (*self._single, self._short, self._long) if shape is not None]
    yield from dict.fromkeys(
      dataclasses.replace(shape.layout, chunk_rows=size)
      for shape in shapes
      for size in shape.sizes[: 1 + sum(size < items for size in shape.sizes)]
    )


def _estimated_tokens(lengths: np.ndarray, row_length: int) -> float:
  """Returns the number of tokens of rows that each have items of one length, not rounded up to whole rows."""
  return float((row_length / (row_length // np.maximum(lengths, 1))).sum())


def _sizes(unit: int, most: int) -> tuple[int, ...]:
  """Returns 1, 2, 3, 4, 6, 8, 12, ... times `unit` up to half of `most`, and `most`."""
  sizes = {size for power in range(most.bit_length()) for size in (unit << power, 3 * unit << power)}
  return tuple(sorted({*(size for size in sizes if size <= most // 2), most}))
