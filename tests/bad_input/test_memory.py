"""Packed files and images that were made to fill the memory are refused, or take no more than is promised."""

import ctypes
import gzip
import io
import zipfile

from PIL import Image
import pytest

from tests.bad_input import campaign, weights
from tests.bad_input.campaign import Tally, refused
from vixml_jax import record_files
from vixml_jax.datasets import raw_records, raw_text
from vixml_jax.images.decoding import MAX_PIXELS, decode
from vixml_jax.inference.queries import QueryFormat
from vixml_jax.inference.query_files import open_queries
from vixml_jax.tables import write_raw_folder
from vixml_jax.weights.npz import NpzFile

_FORM = QueryFormat(("title",), images=0, feature_dim=4)
_READERS = {
  "trn.json.gz": lambda path: list(raw_records.read_queries(path, 1, raw_records.DataWarnings())),
  "lbl.json.gz": lambda path: list(raw_records.read_labels(path, raw_records.DataWarnings())),
  "filter_labels_train.txt": lambda path: raw_records.read_filter(path, 1, 1),
  "label.raw.txt": lambda path: list(raw_text.read_labels(path, raw_records.DataWarnings())),
  "table.jsonl.gz": lambda path: write_raw_folder(path, path.parent / "raw"),
  "table.csv.gz": lambda path: write_raw_folder(path, path.parent / "raw"),
  "queries.jsonl": lambda path: open_queries(path, _FORM).check(8, lambda number: True, print),
  "queries.csv": lambda path: open_queries(path, _FORM).check(8, lambda number: True, print),
}


def _long_line(path, size):
  """Writes a line of so many bytes, packed if the name says so; not all of them are in memory at a time."""
  part = b"a" * 2**20
  with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
    for _ in range(size // len(part)):
      file.write(part)


@pytest.mark.parametrize("name", _READERS)
def test_a_line_that_is_too_long_is_refused_where_it_is(name, tmp_path, monkeypatch):
  monkeypatch.setattr(record_files, "MAX_LINE", 2**20 - 1)
  _long_line(tmp_path / name, 2**20)
  tally = Tally()
  tally.judge(tally.attempt(lambda: _READERS[name](tmp_path / name)), refused(f"{name}:1", "1,048,575 bytes"))


@pytest.mark.slow
@pytest.mark.parametrize("name", _READERS)
def test_a_line_of_half_a_gigabyte_does_not_fill_the_memory(name, tmp_path):
  _long_line(tmp_path / name, 2**29)
  tally = Tally()
  tally.judge(tally.attempt(lambda: _READERS[name](tmp_path / name)), refused(f"{name}:1"))


def _large(mode, kind):
  """Returns an image of the largest size, in kilobytes if its format packs it."""
  side = int(MAX_PIXELS**0.5)
  buffer = io.BytesIO()
  image = Image.new(mode, (side, side))
  image.save(buffer, kind, **({"lossless": True, "method": 0} if kind == "WEBP" else {}))
  return buffer.getvalue()


def _give_back_freed_memory():
  """Returns what malloc keeps for later to the system: an example that takes it again would seem to take nothing."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim:
    trim(0)


# Pillow keeps four bytes of a pixel, and the result three. For WebP, Pillow keeps four frames for a while.
_LIMITS = {"WEBP": 1_100 * 10**6}


@pytest.mark.slow
@pytest.mark.parametrize(
  "mode, kind",
  [
    *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "BMP")),
  ],
)
def test_the_largest_images_take_as_much_memory_as_decode_says(mode, kind, monkeypatch, record_property):
  monkeypatch.setattr(campaign, "PEAK_BYTES", _LIMITS.get(kind, 500 * 10**6))
  blob, tally = _large(mode, kind), Tally()
  _give_back_freed_memory()
  assert tally.attempt(lambda: decode(blob)).shape == (8192, 8192, 3)
  record_property("bad input", (f"{mode} {kind}", 1, 0, tally.seconds, tally.peak / 2**20))


def test_a_tower_that_claims_to_unpack_to_a_thousand_times_its_size_is_refused(tmp_path):
  members = {"a.npy": weights.npy_header("<f4", (2**20,)) + bytes(2**22)}
  (tmp_path / "tower.npz").write_bytes(weights.npz(members.items(), zipfile.ZIP_DEFLATED))
  tally = Tally()
  tally.judge(tally.attempt(lambda: NpzFile(tmp_path / "tower.npz")), refused("tower.npz", "claim to hold"))
