"""Comparison of workdirs query by query: intervals and p-values, written files, and results that cannot be compared."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from tests.helpers.miniature_runs import run_commands
from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import query_metrics
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.ragged import Ragged
from vixml_jax.report.compare import compare_workdirs, paired_bootstrap

LABELS, DEPTH = 40, 10
KS = dict(precision_ks=(1, 3), recall_ks=(10,))
OF = {"data set": "custom", "raw files": "ab" * 32, "split": "test", "queries": "all", "propensity": [0.55, 1.5]}


def results(rng, num_queries, quality, truth=None):
  """Metrics of random rankings whose first label is a true one with probability `quality`."""
  if truth is None:
    truth = Ragged.from_rows([rng.choice(LABELS, rng.integers(1, 4), replace=False) for _ in range(num_queries)])
  ids = np.stack([rng.permutation(LABELS)[:DEPTH] for _ in range(num_queries)])
  for query in np.flatnonzero(rng.random(num_queries) < quality):
    hit = truth[query][0]
    ids[query] = [hit, *ids[query][ids[query] != hit][: DEPTH - 1]]
  return query_metrics(ids, truth, np.linspace(1, 8, LABELS), **KS), truth


@pytest.fixture(scope="module")
def pair():
  rng = np.random.default_rng(0)
  first, truth = results(rng, 400, 0.5)
  return first, results(rng, 400, 0.58, truth)[0]


def test_intervals_and_p_values_are_those_of_scipy(pair):
  first, second = pair
  found = paired_bootstrap(first, second, resamples=2000)
  column = {name: number for number, name in enumerate(first.names)}
  for name in ("P@1", "R@10", "PSP@1"):
    one, two = first.numerators[:, column[name]], second.numerators[:, column[name]]
    below = first.denominators[:, column[name]] if column[name] in first.ratios else np.ones(len(one))

    def statistic(a, b, divisor, axis=-1):
      return 100 * (b.sum(axis) - a.sum(axis)) / divisor.sum(axis)

    expected = scipy.stats.bootstrap(
      (one, two, below), statistic, paired=True, vectorized=True, n_resamples=2000, method="percentile", rng=1
    )
    low, high = expected.confidence_interval
    tolerance = 0.08 * float(high - low)
    assert found[name].difference == pytest.approx(float(statistic(one, two, below)), abs=1e-4)
    assert (found[name].low, found[name].high) == pytest.approx((float(low), float(high)), abs=tolerance), name
    swapped = scipy.stats.permutation_test(
      (one, two),
      lambda a, b, axis=-1: (b - a).mean(axis),
      vectorized=True,
      n_resamples=2000,
      permutation_type="samples",
      rng=2,
    )
    assert found[name].p == pytest.approx(float(swapped.pvalue), abs=0.02), name


def test_a_system_does_not_differ_from_itself_and_a_better_second_system_has_positive_differences(pair):
  first, second = pair
  for same in paired_bootstrap(first, first, resamples=200).values():
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
  better = dataclasses.replace(first, numerators=first.numerators + np.float32(0.01))
  found = paired_bootstrap(first, better, resamples=2000)["P@1"]
  assert (found.difference, found.low, found.high) == pytest.approx((1, 1, 1), abs=1e-3)
  assert found.p == pytest.approx(2 / 2001)
  ahead, behind = (paired_bootstrap(*systems, resamples=200)["P@1"] for systems in ((first, second), (second, first)))
  assert ahead.difference == -behind.difference and ahead.low == pytest.approx(-behind.high)


def test_results_of_different_queries_are_refused(pair):
  other, _ = results(np.random.default_rng(7), 400, 0.5)
  with pytest.raises(ValueError, match="results of different queries or of different metrics"):
    paired_bootstrap(pair[0], other)


@pytest.fixture
def workdirs(tmp_path, pair):
  """Two evaluated workdirs."""
  for name, plain, augmented in (("a", *pair), ("b", *reversed(pair))):
    (tmp_path / name).mkdir()
    PerQuery(OF, {"plain": plain, "augmented": augmented}).save(tmp_path / name / "per_query.npz")
  return tmp_path / "a", tmp_path / "b"


def test_both_rows_are_printed_and_written_as_json_and_as_a_page(workdirs, pair):
  one, two = workdirs
  table = compare_workdirs(one, [two], resamples=200)
  written = json.loads((one / "compare.json").read_text())
  plain, augmented = written["comparisons"]
  assert (plain["row"], augmented["row"]) == ("plain", "augmented")
  assert written["queries"] == 400 and written["of"] == OF
  means = [metrics.mean() for metrics in pair]
  for name in pair[0].names:
    for comparison, first, second in ((plain, *means), (augmented, *reversed(means))):
      found = comparison["metrics"][name]
      assert (found["first"], found["second"]) == (first[name], second[name])
      assert found["low"] <= found["difference"] <= found["high"]
  shown = plain["metrics"]["P@1"]
  line = next(line for line in table.splitlines() if line.startswith("P@1 "))
  assert line.split()[1:4] == [f"{shown['first']:.2f}", f"{shown['second']:.2f}", f"{shown['difference']:+.2f}"]
  page = (one / "compare.html").read_text()
  for name, found in plain["metrics"].items():
    assert f'<th scope="row">{name}</th>' in page
    assert f'<data value="{found["difference"]}">{found["difference"]:+.2f}</data>' in page
  assert not (two / "compare.json").exists()


def test_a_row_that_only_one_workdir_has_is_left_out(workdirs, pair, caplog):
  one, two = workdirs
  PerQuery(OF, {"plain": pair[1]}).save(two / "per_query.npz")
  table = compare_workdirs(one, [two], resamples=50)
  assert "(plain)" in table and "+ retrieval" not in table
  assert f"{one} and {two}: only one of them has these rows, which are left out: + retrieval" in caplog.text


def _other_labels(pair):
  return PerQuery(OF, {"plain": results(np.random.default_rng(3), 400, 0.5)[0]})


def _fewer_metrics(pair):
  metrics = pair[0]
  return PerQuery(OF, {"plain": dataclasses.replace(metrics, names=(*metrics.names[:-1], "Hit@7"))})


@pytest.mark.parametrize(
  "change,message",
  [
    ({"raw files": "cd" * 32}, "b: was evaluated with raw files = cdcdcdcdcdcd, but .*a with abababababab"),
    ({"split": "validation"}, "b: was evaluated with split = validation, but .*a with test"),
    ({"propensity": [0.6, 2.6]}, r"b: was evaluated with propensity = \[0.6, 2.6\], but .*a with \[0.55, 1.5\]"),
    (_other_labels, "b: its queries have other labels than those of .*a"),
    (_fewer_metrics, r"b: has other metrics than .*a \(Hit@10, Hit@7\); evaluate both with the same config.eval.ks"),
  ],
)
def test_workdirs_with_results_on_other_data_are_refused(workdirs, pair, change, message):
  one, two = workdirs
  other = change(pair) if callable(change) else PerQuery(OF | change, {"plain": pair[1]})
  other.save(two / "per_query.npz")
  with pytest.raises(InputError, match=message):
    compare_workdirs(one, [two])
  assert not (one / "compare.json").exists()


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "pickled", "of another kind"])
def test_the_error_for_a_damaged_or_missing_file_names_the_command_that_writes_it(workdirs, damage):
  one, two = workdirs
  path = two / "per_query.npz"
  whole = bytearray(path.read_bytes())
  path.unlink()
  if damage == "short":
    path.write_bytes(whole[: len(whole) // 2])
  elif damage == "flipped":
    whole[len(whole) // 3] ^= 255
    path.write_bytes(whole)
  elif damage == "pickled":
    np.savez(path, names=np.array([{}], dtype=object), ratios=np.zeros(0))
  elif damage == "of another kind":
    np.savez(path, values=np.zeros(3))
  with pytest.raises(InputError, match=r"b/per_query.npz: .*run python -m vixml_jax.evaluate --workdir=.*b first"):
    compare_workdirs(one, [two])


@pytest.mark.parametrize(
  "others,message", [(["a"], "a occurs twice"), (["b", "b"], "b occurs twice"), ([], "contains no workdir")]
)
def test_other_workdirs_must_be_given_and_must_differ(workdirs, others, message):
  with pytest.raises(InputError, match=message):
    compare_workdirs(workdirs[0], [workdirs[0].parent / name for name in others])


def test_the_command_compares_and_refuses_flags_of_evaluation(workdirs, tmp_path):
  one, two = map(str, workdirs)
  done = run_commands(
    {
      "compare": ["evaluate", f"--workdir={one}", f"--compare={two}"],
      "with a flag": ["evaluate", f"--workdir={one}", f"--compare={two}", "--search=exact"],
      "of nothing": ["evaluate", f"--workdir={one}", "--compare="],
    },
    tmp_path,
  )
  status, printed, stderr = done["compare"]
  assert status == 0, stderr
  assert "P@1" in printed and two in printed
  assert json.loads((workdirs[0] / "compare.json").read_text())["resamples"] == 10_000
  for name, words in (
    ("with a flag", "error: --search: cannot be used with --compare"),
    ("of nothing", "contains no workdir"),
  ):
    status, printed, stderr = done[name]
    assert status == 1 and not printed and len(stderr.splitlines()) == 1 and words in stderr, stderr
