"""Tables become raw folders with the rows that they have, or are refused with one line that names file and line."""

import gzip
import json
from pathlib import Path
import tempfile

from tests.bad_input import campaign, tables
from vixml_jax.tables import write_raw_folder

_COLUMNS = {
  "uid": "uid",
  "text": "text",
  "content": "content",
  "labels": "labels",
  "relevance": "relevance",
  "split": "split",
}


def _write(table, place):
  (place / table.name).write_bytes(table.content)
  folder = write_raw_folder(place / table.name, place / "raw", columns=_COLUMNS).folder
  found = {}
  for split, name in (("train", "trn"), ("test", "tst"), ("labels", "lbl")):
    lines = gzip.decompress((folder / f"{name}.json.gz").read_bytes()).split(b"\n")
    found[split] = [json.loads(line) for line in lines if line]
  return found


def _check(tally, case):
  table, expected = case
  with tempfile.TemporaryDirectory() as place:
    tally.judge(tally.attempt(lambda: _write(table, Path(place))), expected)


@campaign.examples_of_each(56)
def test_tables(each, record_property):
  campaign.run("tables", tables.MUTATIONS, _check, each, record_property)
