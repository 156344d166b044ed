"""Raw folders are prepared with the rows that they have, or refused with one line that names file and line."""

from pathlib import Path
import tempfile

import numpy as np

from tests.bad_input import campaign, raw_folders
from vixml_jax.datasets import filters, prepared, raw_images, raw_rows
from vixml_jax.datasets.raw import find_files
from vixml_jax.datasets.raw_records import DataWarnings
from vixml_jax.datasets.records import Records

_PREPARED = 16  # One of so many examples is prepared as a whole; the others are only read, which is faster.


def _read(raw, folder):
  """Returns what preparation reads, without what it writes."""
  files = find_files(raw)
  counts = {split: raw_rows.count_rows(found) for split, found in files.items()}
  filters.load_filters(files, counts)
  rows, images = {}, {}
  for split in ("labels", "train", "test"):
    found = raw_images.read_images(files[split].images, counts[split])
    read = raw_rows.read_rows(files[split], split, counts, DataWarnings())
    pairs = list(zip(found, read, strict=True))
    rows[split] = [_row(row) for _, row in pairs]
    images[split] = [
      (number, slot, blob) for number, (image, _) in enumerate(pairs) for slot, blob in zip(*image, strict=True)
    ]
  return rows | {"images": images}


def _row(row):
  texts = [text if text.strip() else "" for text in (row["uid"], row["title"], row["content"])]
  return (*texts, *(row.get(key, np.zeros(0)).tolist() for key in ("target_ind", "target_rel")))


def _prepare(raw, folder):
  """Returns what a prepared data set has."""
  builder = prepared.prepare("custom", raw, raw.parent / "data")
  rows, images = {}, {}
  for split, given in folder.rows.items():
    records = Records(builder, split).take(range(len(given)))
    assert len(Records(builder, split)) == len(given)
    rows[split] = [
      (
        *(record.text((field,)) for field in ("uid", "title", "content")),
        record.numbers("target_ind", np.int32).tolist(),
        record.numbers("target_rel", np.float32).tolist(),
      )
      for record in records
    ]
    images[split] = [(row, slot, blob) for row, record in enumerate(records) for slot, blob in record.images()]
  return rows | {"images": images}


def _check(tally, case):
  folder, expected = case
  with tempfile.TemporaryDirectory() as place:
    raw = Path(place) / "raw"
    raw.mkdir()
    for name, content in folder.files.items():
      (raw / name).write_bytes(content)
    read = _read if tally.examples % _PREPARED else _prepare
    tally.judge(tally.attempt(lambda: read(raw, folder)), expected)


@campaign.examples_of_each(50)
def test_raw_folders(each, record_property):
  campaign.run("raw folders", raw_folders.MUTATIONS, _check, each, record_property)
