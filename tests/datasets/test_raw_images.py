"""The reader of raw images: slots and bytes by row, and one line with file and record for every kind of bad input."""

import io

from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.damage import hide_a_page
from vixml_jax.datasets.raw_images import read_images
from vixml_jax.errors import InputError


def _png(value=0):
  buffer = io.BytesIO()
  Image.new("L", (2, 2), value).save(buffer, "PNG")
  return buffer.getvalue()


def _images(path, columns, num_rows=4):
  pq.write_table(pa.table(columns), path)
  return list(read_images(path, num_rows))


@pytest.mark.parametrize("column", ["png", "image"])
def test_images_come_by_row_with_their_slots_and_bytes(tmp_path, column):
  first, second, third = _png(1), _png(2), _png(3)
  columns = {column: [first, second, third], "slot": [0, 2, 1], "row": [1, 1, 3]}
  assert _images(tmp_path / "trn_images.parquet", columns) == [
    ([], []),
    ([0, 2], [first, second]),
    ([], []),
    ([1], [third]),
  ]


def test_set_without_images_yields_empty_lists(tmp_path):
  assert list(read_images(tmp_path / "trn_images.parquet", 2)) == [([], []), ([], [])]


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ({"row": [0], "slot": [0], "jpeg": [_png()]}, "columns must be row, slot, png; found"),
    ({"row": [0, 4], "slot": [0, 0], "png": [_png()] * 2}, "record 1: row 4, slot 0 is out of range"),
    ({"row": [0, 0], "slot": [0, -1], "png": [_png()] * 2}, "record 1: row 0, slot -1 is out of"),
    ({"row": [1, 0], "slot": [0, 0], "png": [_png()] * 2}, "record 1: row 0, slot 0 comes after row"),
    ({"row": [1, 1], "slot": [0, 0], "png": [_png()] * 2}, "sort the file by row and slot"),
    ({"row": [0, 1], "slot": [0, 0], "png": [_png(), b"x"]}, "record 1: row 1, slot 0 is not a PNG"),
    ({"row": [0], "slot": [0], "png": ["text"]}, "record 0: row and slot must be integers"),
    ({"row": [0, None], "slot": [0, 0], "png": [_png()] * 2}, "record 1: row and slot"),
  ],
)
def test_bad_image_record_is_named(tmp_path, columns, message):
  path = tmp_path / "trn_images.parquet"
  with pytest.raises(InputError, match=message) as caught:
    _images(path, columns)
  assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
  "group, reason",
  [(300, "its pages have 0 of the 300 rows of its footer"), (256, "its pages have 256 of the 300 rows")],
)
def test_a_page_that_pyarrow_skips_is_no_lack_of_images(tmp_path, group, reason):
  path = tmp_path / "trn_images.parquet"
  table = pa.table({"row": range(300), "slot": [0] * 300, "png": [_png()] * 300})
  pq.write_table(table, path, row_group_size=group, write_page_checksum=True)
  hide_a_page(path)
  with pytest.raises(InputError, match=rf"^{path}: not a readable parquet file \({reason}"):
    list(read_images(path, 300))


@pytest.mark.slow
def test_images_with_any_flipped_bit_in_the_pages_are_right_or_refused(tmp_path):
  path, blobs = tmp_path / "trn_images.parquet", [b"BM1", b"BM22", b"GIF89a"]
  pq.write_table(pa.table({"row": [0, 0, 2], "slot": [1, 2, 4], "png": blobs}), path, write_page_checksum=True)
  expected, content = list(read_images(path, 4)), path.read_bytes()
  footer, refused = int.from_bytes(content[-8:-4], "little") + 8, 0
  for bit in range(4 * 8, (len(content) - footer) * 8):
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
      assert list(read_images(path, 4)) == expected, bit
    except InputError:
      refused += 1
  assert refused > 1000


def test_image_file_that_is_not_parquet_is_named(tmp_path):
  path = tmp_path / "trn_images.parquet"
  path.write_bytes(b"PAR1 not really")
  with pytest.raises(InputError, match="not a readable parquet file"):
    list(read_images(path, 1))
