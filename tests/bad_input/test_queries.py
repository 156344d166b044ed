"""Files of queries give the queries that they have, or are refused with one line that names file and line."""

from pathlib import Path
import tempfile

import numpy as np

from tests.bad_input import campaign, queries
from vixml_jax.inference.queries import QueryFormat
from vixml_jax.inference.query_files import open_queries

_FORM = QueryFormat(("title", "content"), images=3, feature_dim=queries.DIM)


def _read(path):
  file = open_queries(path, _FORM)
  seen = []
  count = file.check(2, lambda number: True, seen.append)
  found = [query for _, block in file.blocks(2, lambda number: True) for query in block]
  assert count == len(found) == len(seen)
  assert [query.text for query in seen] == [query.text for query in found]
  return [
    (
      query.text,
      [image.tolist() if isinstance(image, np.ndarray) else image for image in query.images],
      query.allow,
      query.deny,
      query.categories,
      query.uid,
    )
    for query in found
  ]


def _check(tally, case):
  file, expected = case
  with tempfile.TemporaryDirectory() as place:
    path = Path(place) / file.name
    path.write_bytes(file.content)
    found = tally.attempt(lambda: _read(path))
    if expected.value == "anything" and not isinstance(found, campaign.Refused):
      return  # A footer has no checksum.
    tally.judge(found, expected)


@campaign.examples_of_each(64)
def test_queries(each, record_property):
  campaign.run("files of queries", queries.MUTATIONS, _check, each, record_property)
