"""Reading of Parquet files: small batches, and one line for files with a name twice, without some rows, or damaged."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.damage import cut_off, hide_a_page
from vixml_jax.errors import InputError
from vixml_jax.parquet_files import open_parquet, read_errors, row_batches


def _write(path, table):
  pq.write_table(table, path, row_group_size=5, write_page_checksum=True)
  return path


@pytest.mark.parametrize("group, sizes, first", [(None, [4, 4, 4], 0), (1, [4, 1], 5), (2, [2], 10)])
def test_rows_of_a_file_or_of_a_row_group_come_in_batches(tmp_path, group, sizes, first):
  path = _write(tmp_path / "a.parquet", pa.table({"x": range(12), "y": range(12)}))
  with open_parquet(path) as file:
    batches = list(row_batches(file, 4, ["x"], group))
  assert [len(batch) for batch in batches] == sizes
  assert [row for batch in batches for row in batch.to_pylist()] == [{"x": first + i} for i in range(sum(sizes))]


@pytest.mark.parametrize("group", [None, 2])
def test_a_page_that_pyarrow_skips_is_an_error_after_the_other_rows(tmp_path, group):
  path = _write(tmp_path / "a.parquet", pa.table({"x": range(12)}))
  hide_a_page(path)
  with open_parquet(path) as file, pytest.raises(pa.ArrowInvalid, match=r"^its pages have \d+ of the (12|2) rows of"):
    list(row_batches(file, 4, None, group))


def test_two_columns_with_one_name_are_refused(tmp_path):
  path = _write(tmp_path / "a.parquet", pa.table([pa.array([1])] * 3, names=["x", "y", "x"]))
  with pytest.raises(InputError, match=rf"^{path}: has two columns 'x'; remove or rename one$"):
    open_parquet(path)


def test_errors_of_pyarrow_name_the_file_and_say_what_to_do(tmp_path):
  path = _write(tmp_path / "a.parquet", pa.table({"x": range(12)}))
  cut_off(path)
  said = rf"^{path}: not a readable parquet file \(.*\); copy or write it again$"
  with pytest.raises(InputError, match=said), read_errors(path):
    open_parquet(path)
  said = r"^the file: cannot be read \(.*\); is it whole\?$"
  with pytest.raises(InputError, match=said), read_errors("the file", "cannot be read", "is it whole?"):
    open_parquet(path)


def test_other_errors_keep_their_type():
  with pytest.raises(ZeroDivisionError), read_errors("the file"):
    _ = 1 / 0
