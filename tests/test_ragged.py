"""Operations on rows of different lengths; the doctests of `vixml_jax.ragged` show the others."""

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged


def test_the_first_values_of_rows_are_kept():
  rows = Ragged.from_rows([[4, 5, 6], [], [7], [8, 9]])
  kept = rows.first(2)
  assert [row.tolist() for row in kept] == [[4, 5], [], [7], [8, 9]]
  assert rows.first(3) is rows
  assert len(rows.first(0).values) == 0


def test_transposing_twice_sorts_the_values_of_rows():
  rng = np.random.default_rng(0)
  rows = Ragged.from_rows([rng.choice(20, rng.integers(0, 8), replace=False) for _ in range(50)])
  columns = rows.transpose(20)
  assert [column.tolist() for column in columns] == [
    [row for row in range(50) if value in rows[row]] for value in range(20)
  ]
  assert [row.tolist() for row in columns.transpose(50)] == [sorted(row.tolist()) for row in rows]


def test_saved_rows_are_loaded_memory_mapped(tmp_path):
  rows = Ragged.from_rows([[4, 5, 6], [], [7]])
  rows.save(tmp_path / "rows")
  loaded = Ragged.load(tmp_path / "rows")
  assert isinstance(loaded.values, np.memmap)
  assert [row.tolist() for row in loaded] == [[4, 5, 6], [], [7]]
  (tmp_path / "rows.values.npy").write_bytes(b"damaged")
  with pytest.raises(InputError, match="rows.values.npy: cannot be read .* delete its folder"):
    Ragged.load(tmp_path / "rows")


@pytest.mark.parametrize("offsets, message", [([1, 4], "start at 0"), ([], "start at 0"), ([0, 3], "end at 3, but")])
def test_offsets_that_do_not_fit_the_values_are_refused(offsets, message):
  with pytest.raises(ValueError, match=message):
    Ragged(np.arange(4), np.array(offsets, np.int64))
