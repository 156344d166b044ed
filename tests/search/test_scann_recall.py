"""ScaNN reaches the recall that is asked for, on queries that its settings were not chosen on."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.search_cases import CHECKPOINT, index_contents, mesh_of_two, needs_scann, opened, unit
from vixml_jax.search import index, scann_recall
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.label_index_files import write_index
from vixml_jax.search.membership import overlap
from vixml_jax.search.scann_index import ScannIndex, ScannParameters
from vixml_jax.search.scann_recall import QuerySample, RecallGoal, _fewest_leaves, _Trial, reach_recall

PARAMETERS = ScannParameters(
  leaves=32, leaves_to_search=1, reorder=100, dimensions_per_block=2, soar=True, bfloat16=False
)
DIM = 16


@pytest.fixture(scope="module")
def case():
  """Labels around centers, ScaNN over them with few leaves to search, and exact search."""
  rng = np.random.default_rng(0)
  points = rng.normal(size=(80, DIM))[rng.integers(0, 80, 3000)] + 0.7 * rng.normal(size=(3000, DIM))
  points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
  labels = points[:2600]
  return ScannIndex(labels, k=100, parameters=PARAMETERS), ExactIndex(labels, mesh_of_two()), points[2600:]


def _recall(scann, exact, queries):
  return overlap(scann.search(queries, 100)[1], exact.search(queries, 100)[1])


@needs_scann
@pytest.mark.parametrize("recall", [0.7, 0.95])
def test_the_recall_is_reached_on_other_queries_without_searching_more_leaves_than_needed(case, recall):
  scann, exact, queries = case
  reach_recall(scann, exact, RecallGoal(recall, QuerySample(queries[:300], "queries")))
  chosen = scann.parameters
  assert _recall(scann, exact, queries[300:]) > recall - 0.01
  scann.parameters = dataclasses.replace(chosen, leaves_to_search=max(1, chosen.leaves_to_search * 3 // 4))
  assert chosen.leaves_to_search < PARAMETERS.leaves and _recall(scann, exact, queries[:300]) < recall + 0.02


@needs_scann
def test_a_recall_that_no_setting_reaches_gives_the_highest_one_and_a_warning(case, monkeypatch, caplog):
  scann, exact, queries = case
  monkeypatch.setattr(scann_recall, "_REORDER", (1,))
  with caplog.at_level("WARNING"):
    reach_recall(scann, exact, RecallGoal(0.999, QuerySample(queries[:50], "held-out queries")))
  assert (scann.parameters.leaves_to_search, scann.parameters.reorder) == (32, 100)
  assert "32 of 32 leaves" in caplog.text and "50 held-out queries" in caplog.text
  assert "99.9 % cannot be reached: use exact search or a lower recall" in caplog.text


@pytest.mark.parametrize(("needed", "most"), [(1, 64), (5, 64), (23, 64), (64, 64), (0, 0)])
def test_the_fewest_leaves_are_found_up_to_a_sixteenth(needed, most):
  tried = []

  def attempt(leaves):
    tried.append(leaves)
    return _Trial(leaves, 100, leaves / 64, leaves / 64, 1.0)

  found = _fewest_leaves(attempt, needed / 64, fewest=min(1, most), most=most, seconds=np.inf)
  assert needed <= found.leaves <= needed * 17 / 16 and len(tried) <= 12


def test_more_leaves_are_not_tried_once_they_take_too_long():
  found = _fewest_leaves(lambda leaves: _Trial(leaves, 100, 0.0, 0.0, leaves), 0.5, fewest=1, most=64, seconds=7)
  assert (found.leaves, found.sure) == (8, 0.0)


@needs_scann
@pytest.mark.parametrize("search", ["scann", "exact"])
def test_an_index_keeps_the_recall_that_was_asked_for_and_a_sample_of_held_out_queries(tmp_path, monkeypatch, search):
  goals = []
  choose = lambda scann, exact, goal: goals.append(goal)
  monkeypatch.setattr(index, "reach_recall", choose)
  monkeypatch.setattr(index, "ScannIndex", lambda labels, rows: ScannIndex(labels, rows=rows, parameters=PARAMETERS))
  held_out = unit(30, 9)
  write_index(
    tmp_path / "index",
    index_contents(held_out=held_out),
    checkpoint=CHECKPOINT,
    search=search,
    scann_recall=0.9,
    mesh=mesh_of_two(),
  )
  searched = opened(tmp_path / "index", search="scann")
  _ = searched.label_index, searched.query_index
  assert searched.info["search"]["scann_recall"] == 0.9
  edited = searched.delete(range(10))  # Over a tenth: ScaNN is built again.
  if search == "scann":
    assert edited.info["recall"]["queries"] == 15 and edited.info["recall"]["of"] == "held-out queries"
  opened(tmp_path / "index", search="scann").label_index  # noqa: B018, builds ScaNN where it is not stored
  assert len(goals) >= 3
  for goal in goals:
    assert goal.recall == 0.9 and goal.sample.of == "held-out queries"
    np.testing.assert_array_equal(goal.sample.queries, held_out[::2])
