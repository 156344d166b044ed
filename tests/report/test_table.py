"""The table on the terminal: rows, intervals and baselines in aligned columns."""

from vixml_jax.report.table import metrics_table


def test_table_is_aligned_and_complete():
  table = metrics_table(
    {"plain": {"P@1": 48.336, "R@100": 7}, "retrieval-augmented": {"P@1": 100.0}},
    columns=("P@1", "R@100"),
    baselines={"TF-IDF": {"P@1": 62.33}},
    intervals={"plain": {"P@1": (47.0, 49.6)}},
  )
  assert table.splitlines() == [
    "                             P@1  R@100",
    "---------------------------------------",
    "plain                48.34 ±1.30   7.00",
    "retrieval-augmented       100.00      -",
    "---------------------------------------",
    "TF-IDF                     62.33      -",
  ]


def test_without_baselines_there_is_one_rule():
  assert metrics_table({"a": {"P@1": 1.0}}, columns=("P@1",)).splitlines() == ["    P@1", "-------", "a  1.00"]


def test_default_columns_are_the_published_ones():
  assert metrics_table({}).splitlines()[0].split() == [
    "P@1",
    "P@3",
    "P@5",
    "PSP@1",
    "PSP@3",
    "PSP@5",
    "nDCG@5",
    "R@10",
    "R@100",
  ]
