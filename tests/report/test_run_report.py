"""Files that an evaluation writes: metrics of each query, and of queries with and without images."""

import json

import pytest

from vixml_jax.evaluation.per_query import PerQuery


def test_the_metrics_of_queries_add_up_to_those_of_the_run_and_of_queries_with_and_without_images(with_images):
  trained = with_images.workdir
  final, evaluation = (json.loads((trained / f"{name}.json").read_text()) for name in ("final_metrics", "evaluation"))
  saved = PerQuery.load(trained / "per_query.npz")
  assert saved.description["split"] == "test" and saved.description["data set"] == "custom"
  assert saved.rows["plain"].mean() == {name: final[name] for name in saved.rows["plain"].names}
  assert saved.rows["augmented"].mean() == {name: final[f"RA/{name}"] for name in saved.rows["augmented"].names}
  groups = evaluation["by_images"]
  assert sorted(groups) == ["with images", "without images"]
  assert sum(group["queries"] for group in groups.values()) == evaluation["queries"] == 16
  for name in ("P@5", "R@10", "RA/Hit@3"):  # Means over queries, unlike PSP.
    total = sum(group["queries"] * group["metrics"][name] for group in groups.values())
    assert total / 16 == pytest.approx(final[name])
