"""The served index finds what exact search finds, with few programs."""

import numpy as np
import pytest

from tests.helpers.compilations import counted_compilations
from vixml_jax.search import filters as search_filters
from vixml_jax.search.filters import Filters
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.label_index_files import IndexContents, write_index
from vixml_jax.serving import served_index
from vixml_jax.serving.served_index import ServedIndex


@pytest.mark.parametrize("gather", [4, 10_000])
def test_few_programs_find_what_exact_search_finds(tmp_path, monkeypatch, gather):
  """Compares every kind of filter with brute force; allow lists longer than `gather` are masked on the devices."""
  for module in (served_index, search_filters):
    monkeypatch.setattr(module, "GATHER_AT_MOST", gather)
  rng = np.random.default_rng(0)
  labels, queries = (rng.standard_normal((rows, 8), np.float32) for rows in (150, 13))
  groups = [["all", "odd"] if i % 2 else ["all"] for i in range(150)]
  gone = rng.random(150) < 0.1
  names = [str(i) for i in range(150)]
  write_index(
    tmp_path / "index",
    IndexContents(labels, names, names, np.zeros(150, np.int32), np.zeros((1, 8), np.float32), gone, categories=groups),
    checkpoint={},
    search="exact",
  )
  labels_of_index = LabelIndex.open(tmp_path / "index", checkpoint=None)
  index = ServedIndex(labels_of_index)
  index.open_parts()
  for program in index.warm_up(40, 13):
    program()
  with counted_compilations() as compiled:
    for k in (1, 9, 17, 30):
      deny = [rng.permutation(150)[: rng.integers(0, 10)] for _ in queries]
      allow = [None if i % 3 == 0 else rng.permutation(150)[: 2 * i] for i in range(13)]
      classes = [["odd"] if i % 4 == 1 else None for i in range(13)]
      filters = labels_of_index.filters(
        *([None if row is None else [str(label) for label in row] for row in rows] for rows in (allow, deny)),
        categories=classes,
      )
      for filtered in (None, Filters(deny=filters.deny), filters):
        scores, ids = index.search(queries, k, filtered)
        for i, query in enumerate(queries):
          may = ~gone.copy()
          if filtered is not None:
            may[deny[i]] = False
          if filtered is filters:
            may &= True if allow[i] is None else np.isin(np.arange(150), allow[i])
            may &= True if classes[i] is None else np.arange(150) % 2 == 1
          best = np.flatnonzero(may)[np.argsort(-(labels @ query)[may], kind="stable")][:k]
          assert ids[i].tolist() == best.tolist() + [-1] * (k - len(best))
          np.testing.assert_allclose(scores[i][: len(best)], (labels @ query)[best], rtol=1e-5, atol=1e-6)
  assert not compiled
  with counted_compilations() as compiled:
    labels_of_index.search(queries, 11 if gather == 4 else 12)  # A width per case: programs are kept.
  assert compiled
