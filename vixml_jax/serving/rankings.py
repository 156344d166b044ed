"""The rankings that a server offers for one model, and the one that a request gets by default."""

from collections.abc import Callable, Collection
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from vixml_jax.blend.libraries import check_blend_libraries
from vixml_jax.errors import InputError
from vixml_jax.inference.loading import with_ranking
from vixml_jax.inference.predictor import LabelSearch, Predictor
from vixml_jax.inference.rankings import AUGMENTED, BLEND, PLAIN, RANKINGS
from vixml_jax.run.workdir import EVALUATION, FINAL_METRICS, INDEX
from vixml_jax.search import snapshots
from vixml_jax.search.label_index import LabelIndex

_PREFIXES = {PLAIN: "", AUGMENTED: "RA/", BLEND: "blend/"}  # Of the keys of final_metrics.json.

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DefaultRanking:
  """The ranking of requests that name none.

  Attributes:
    name: One of `RANKINGS`.
    reason: Why it is the default.
  """

  name: str
  reason: str


def best_ranking(workdir: Path, among: Collection[str] = RANKINGS, dims: int | None = None) -> DefaultRanking:
  """Returns the ranking of highest P@1 in the evaluation of a run, among those that its index has.

  Args:
    workdir: Folder of the run.
    among: The rankings to choose from.
    dims: Number of dimensions that are searched; None for all. The blend needs all.

  Raises:
    InputError: The index is missing or damaged, or has none of the rankings.
  """
  info = snapshots.read_current(workdir / INDEX).info
  offered = [name for name in _available(info["retrieval"], info.get("blend"), dims) if name in among]
  if not offered:
    cut = "" if dims is None else f" for dims={dims}"
    raise InputError(f"{workdir / INDEX}: has no ranking {' or '.join(among)}{cut}; choose others with --rankings")
  if len(offered) == 1:
    return DefaultRanking(offered[0], "no other ranking is offered")
  final, evaluation = (_read(workdir / name) for name in (FINAL_METRICS, EVALUATION))
  values = {name: final[f"{_PREFIXES[name]}P@1"] for name in offered if f"{_PREFIXES[name]}P@1" in final}
  if not values:
    return DefaultRanking(offered[0], f"{FINAL_METRICS} has no P@1 to choose by")
  best = max(values, key=lambda name: values[name])
  split = {"validation": "held-out", "test": "test"}.get(evaluation.get("split", ""), "evaluated")
  compared = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
  return DefaultRanking(best, f"highest P@1 on the {split} queries of the run ({compared})")


@dataclasses.dataclass(frozen=True)
class Rankings:
  """Predictors that share an encoder and an index, by ranking.

  Attributes:
    predictors: Predictor of each ranking, in the order of `RANKINGS`.
    default: The ranking of requests that name none.
  """

  predictors: dict[str, Predictor]
  default: DefaultRanking

  @classmethod
  def of(
    cls,
    predictor: Predictor,
    among: Collection[str] = RANKINGS,
    reason: str = "the server was started with it",
    **settings: Any,
  ) -> "Rankings":
    """Returns the rankings that an index has; that of `predictor` is the default.

    Args:
      predictor: A loaded predictor.
      among: The rankings to offer.
      reason: Why the ranking of `predictor` is the default.
      **settings: Settings of `with_ranking` for the other rankings.
    """
    index = predictor.index
    names = {*_available(index.retrieval, index.blend, index.form.dims)} & {*among} | {predictor.ranking}
    predictors = {
      name: predictor if name == predictor.ranking else with_ranking(predictor, name, **settings)
      for name in RANKINGS
      if name in names
    }
    return cls(predictors, DefaultRanking(predictor.ranking, reason))

  @property
  def first(self) -> Predictor:
    """Predictor of the default ranking."""
    return self.predictors[self.default.name]

  @property
  def hits(self) -> tuple[int, set[int]]:
    """Largest number of labels that a ranking looks up for a query, and the numbers of training queries."""
    found = [predictor.hits for predictor in self.predictors.values()]
    return max(labels for labels, _ in found), {queries for _, queries in found if queries}

  def with_index(self, index: LabelIndex, label_search: LabelSearch) -> "Rankings":
    """Returns the rankings with another snapshot of the index, or with another search of the same one.

    Raises:
      InputError: A ranking needs something that the snapshot lacks.
    """
    if index is self.first.index:
      change: Callable[[Predictor], Predictor] = lambda each: dataclasses.replace(each, label_search=label_search)
    else:
      change = lambda each: each.with_index(index, label_search)
    return dataclasses.replace(self, predictors={name: change(each) for name, each in self.predictors.items()})


def _available(retrieval: object, blend: object, dims: int | None) -> list[str]:
  """Returns the rankings that an index has, given what it stores for both others than plain search."""
  names = [PLAIN] + [AUGMENTED] * (retrieval is not None)
  if blend is not None and dims is None:  # It was fitted on all dimensions.
    try:
      check_blend_libraries()
      names.append(BLEND)
    except InputError as error:
      _log.warning("the ranking blend is not offered: %s", error)
  return names


def _read(path: Path) -> dict[str, Any]:
  """Returns a JSON file of an evaluation; nothing if it is missing or damaged, because the server can do without."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}
