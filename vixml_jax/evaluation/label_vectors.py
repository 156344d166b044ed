"""The vectors of labels that are searched: their prototypes, to which a share of their classifiers may be added.

The inner product of such a vector with a query is the score of the prototype plus the share times the score of the
classifier, without its bias; so one search ranks labels by both. All vectors are divided by one number, so that scores
are about as large as cosines.

A label without a classifier, such as one that is added later, takes part with the score that a classifier gives on
average to a label of such a prototype: `slope` times the prototype's score, plus a constant. With the score of its
prototype alone, it would hardly ever be found beside the others.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vixml_jax import sharding
from vixml_jax.evaluation import tuning
from vixml_jax.evaluation.evaluator import EvaluationQueries
from vixml_jax.evaluation.plain_search import search_metrics
from vixml_jax.label_classifiers import SCALE
from vixml_jax.rounding import at_equal_distances
from vixml_jax.search.exact import ExactIndex
from vixml_jax.sharded_rows import ShardedRows
from vixml_jax.stages import stage

SHARES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2)
"""Shares of classifiers that are tried."""
MOST_QUERIES = 8192
"""Number of held-out queries that the share is chosen on, at most."""
_QUERIES_PER_BLOCK = 1024
_NEAREST = 10  # Number of labels a query that classifiers are compared with prototypes on.


@dataclasses.dataclass(frozen=True)
class ShareSetting:
  """A share of the classifiers, and the metrics that plain search reaches with it.

  Attributes:
    share: Weight of the score of a label's classifier, relative to that of its prototype.
    metrics: Metrics in percent, by name.
  """

  share: float
  metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ClassifierMix:
  """How the vectors of labels are made of prototypes and classifiers.

  Attributes:
    share: Weight of the score of a label's classifier, relative to that of its prototype.
    slope: By how much the mean score of classifiers grows with that of the prototype.
    offset: float32 [D], the vector whose inner product with an average query is that mean at a prototype's score of 0.
  """

  share: float
  slope: float
  offset: np.ndarray

  @property
  def divisor(self) -> float:
    """What all vectors are divided by; a label without a classifier then keeps its prototype, plus a fixed vector."""
    return 1 + self.share * self.slope

  @property
  def without_classifier(self) -> np.ndarray:
    """What is added to the prototype of a label without a classifier, float32 [D]."""
    return np.asarray(self.share * self.offset / self.divisor, np.float32)

  def vectors(self, prototypes: ShardedRows, classifiers: ShardedRows, hidden: np.ndarray | None = None) -> ShardedRows:
    """Returns the vectors of labels, float32 [L, D]; they do not have unit norm.

    Args:
      prototypes: [L, D] at unit norm.
      classifiers: [L, D + 1], see `label_classifiers`; NaN for a label without a classifier.
      hidden: bool [L], labels whose classifiers are not used either; None for none.
    """
    unused = np.zeros(len(prototypes.values), bool)
    if hidden is not None:
      unused[: len(prototypes)] = hidden
    placed = sharding.to_global(unused, sharding.named_sharding(prototypes.mesh, "label"))
    offset = sharding.to_global(self.without_classifier, sharding.named_sharding(prototypes.mesh))
    scales = np.array([1, self.share * SCALE], np.float32) / np.float32(self.divisor)
    return ShardedRows(add_classifiers(prototypes.values, classifiers.values, placed, offset, scales), len(prototypes))


def mix_of(
  share: float, prototypes: ShardedRows, classifiers: ShardedRows, held_out: EvaluationQueries
) -> ClassifierMix:
  """Returns the mix of a share, whose slope and offset are fitted to the ten nearest labels of held-out queries.

  Args:
    share: Weight of the score of a label's classifier.
    prototypes: [L, D]; their centroids know no held-out query.
    classifiers: [L, D + 1], which know none either; NaN for a label without a classifier.
    held_out: The held-out queries; at most 8,192 are used, at equal distances.
  """
  queries = held_out.take(at_equal_distances(len(held_out), MOST_QUERIES))
  index = ExactIndex(prototypes, prototypes.mesh)
  by_prototype, by_classifier = [], []
  for _, block in queries.blocks(_QUERIES_PER_BLOCK):
    embeddings = np.asarray(block.embeddings)
    scores, ids = index.search(embeddings, min(_NEAREST, len(prototypes)))
    wanted = np.pad(ids, ((0, _QUERIES_PER_BLOCK - len(ids)), (0, 0)))  # One shape: one compiled program.
    found = np.asarray(classifiers.take(wanted.ravel())).reshape(*wanted.shape, -1)[: len(ids)]
    by_prototype.append(scores.ravel())
    by_classifier.append(SCALE * np.einsum("qkd,qd->qk", found[..., :-1], embeddings).ravel())
  x, y = np.concatenate(by_prototype), np.concatenate(by_classifier)
  known = np.isfinite(y)
  slope, constant = np.polyfit(x[known], y[known], 1) if known.sum() > _NEAREST else (0.0, 0.0)
  mean = np.asarray(queries.embeddings).mean(axis=0)
  slope = max(slope, 0.0)
  return ClassifierMix(share, float(slope), (constant * mean / np.sum(np.square(mean))).astype(np.float32))


def choose_share(
  prototypes: ShardedRows,
  classifiers: ShardedRows,
  held_out: EvaluationQueries,
  propensity: np.ndarray,
  shares: Sequence[float] = SHARES,
) -> tuple[ClassifierMix, list[ShareSetting]]:
  """Returns the mix that is best for plain search of held-out queries (`tuning.pick`, P@1), and all that were tried.

  Args:
    prototypes: [L, D]; their centroids know no held-out query.
    classifiers: [L, D + 1], which know none either; NaN for a label without a classifier.
    held_out: The held-out queries; at most 8,192 are used, at equal distances.
    propensity: Inverse propensities [L].
    shares: Shares to try.
  """
  queries, settings = held_out.take(at_equal_distances(len(held_out), MOST_QUERIES)), []
  fitted = mix_of(0.0, prototypes, classifiers, queries)
  with stage(f"choose the share of classifiers on {len(queries):,} held-out queries", total=len(shares)) as progress:
    for share in shares:
      vectors = dataclasses.replace(fitted, share=share).vectors(prototypes, classifiers) if share else prototypes
      index = ExactIndex(vectors, vectors.mesh)
      metrics = search_metrics(index, queries, propensity, (1,), (100,)).mean()
      settings.append(ShareSetting(share, {name: metrics[name] for name in ("P@1", "PSP@1", "R@100")}))
      progress.advance(1)
  return dataclasses.replace(fitted, share=tuning.pick(settings, "P@1", len(queries)).share), settings


@jax.jit
def add_classifiers(
  prototypes: jax.Array, classifiers: jax.Array, hidden: jax.Array, offset: jax.Array, scales: jax.Array
) -> jax.Array:
  """Returns the vectors of labels [rows, D]; arguments as in `ClassifierMix.vectors`, sharded by rows.

  Args:
    prototypes: [rows, D].
    classifiers: [rows, D + 1].
    hidden: bool [rows].
    offset: [D], what is added to the prototype of a label without a classifier.
    scales: [2], of prototypes and of classifiers.
  """
  unknown = hidden | jnp.isnan(classifiers[:, -1])
  return jnp.where(unknown[:, None], prototypes + offset, scales[0] * prototypes + scales[1] * classifiers[:, :-1])
