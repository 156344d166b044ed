"""Measures the time and memory of the blend at the size of a published data set, beside the search of embeddings.

  python -m benchmarks.blend_ranking [--labels=1305265] [--train_queries=2248619] [--queries=512] [--dim=384]

The words of labels and training queries are drawn from a Zipf distribution. The results of the search of embeddings are
random, and so are classifiers and trees. About as many candidates of a query pass all models of trees as on MM-Icons,
where they are 43. `--dim=0` leaves the classifiers out. Times are seconds of a clock and processor seconds of this
process, which depend less on other programs. The memory is that of the process at most.
"""

import resource
import time

from absl import app, flags
import numpy as np
import scipy.sparse

from vixml_jax.blend.features import FEATURES
from vixml_jax.blend.lexical import NUM_COLUMNS, TfIdf
from vixml_jax.blend.model import LEAST_FOR_ALL, BlendModel
from vixml_jax.blend.ranking import BlendIndex, ScoredCandidates
from vixml_jax.ragged import Ragged, offsets_of
from vixml_jax.search.retrieval_augmented import Neighbors

_LABELS = flags.DEFINE_integer("labels", 1_305_265, "Number of labels.")
_TRAIN_QUERIES = flags.DEFINE_integer("train_queries", 2_248_619, "Number of training queries.")
_QUERIES = flags.DEFINE_integer("queries", 512, "Number of queries that are ranked.")
_BLOCK = flags.DEFINE_integer("block", 64, "Number of queries that are ranked at a time.")
_DIM = flags.DEFINE_integer("dim", 384, "Width of the embeddings that classifiers read; 0 for no classifiers.", 0)
_WORDS = flags.DEFINE_integer("words", 9, "Words of an item; it has as many pairs of words, less one.")
_LABELS_PER_QUERY = 5
_LIKELY = 43  # Candidates of a query of MM-Icons with a probability of LEAST_FOR_ALL or more.


def _counts(rng: np.random.Generator, rows: int) -> scipy.sparse.csr_array:
  """Returns the counts of words and pairs of random texts [rows, F]."""
  words = (rng.zipf(1.2, (rows, _WORDS.value)) % 300_000).astype(np.int64)
  pairs = words[:, :-1] * 300_007 + words[:, 1:]
  columns = (np.concatenate([words, pairs], axis=1) * 2_654_435_761 % NUM_COLUMNS).astype(np.int32)
  ones = np.ones(columns.size, np.float32)
  matrix = scipy.sparse.csr_array(
    (ones, columns.ravel(), offsets_of(np.full(rows, columns.shape[1]))), shape=(rows, NUM_COLUMNS)
  )
  matrix.sum_duplicates()
  return matrix


def _neighbors(rng: np.random.Generator, count: int, labels: int, queries: int, index: BlendIndex) -> Neighbors:
  """Returns random results of the search of embeddings."""

  def found(total: int, hits: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.stack([rng.choice(total, hits, replace=False) for _ in range(count)]).astype(np.int32)
    return -np.sort(-rng.uniform(0.2, 0.9, ids.shape).astype(np.float32), axis=1), ids

  return Neighbors(*found(labels, index.widths.labels), *found(queries, index.widths.queries))


def main(argv: list[str]) -> None:
  """Prints the time to build the indexes, the time of a query by its parts, and the memory."""
  del argv
  rng = np.random.default_rng(0)
  labels, queries = _LABELS.value, _TRAIN_QUERIES.value
  counts = [_counts(rng, labels), _counts(rng, queries)]
  tfidf = TfIdf.fit(counts)
  vectors = [tfidf.vectors(part) for part in counts]
  stored = sum(part.data.nbytes + part.indices.nbytes + part.indptr.nbytes for part in vectors)
  positives = rng.integers(0, labels, queries * _LABELS_PER_QUERY).astype(np.int32).reshape(queries, -1)
  positives.sort(axis=1)
  rows = Ragged.of_lengths(positives.ravel(), np.full(queries, _LABELS_PER_QUERY))
  classifiers = rng.random((labels, _DIM.value + 1), np.float32) if _DIM.value else None
  embeddings = rng.random((_QUERIES.value, _DIM.value), np.float32)
  started = time.process_time()
  index = BlendIndex.build(*vectors, rows, classifiers_of=None if classifiers is None else classifiers.__getitem__)
  print(f"{labels:,} labels, {queries:,} training queries: {stored / 2**30:.2f} GiB of word vectors")
  print(f"inverted indexes built in {time.process_time() - started:.1f} s")
  propensity = rng.uniform(1, 10, labels)
  asked = tfidf.vectors(_counts(rng, _QUERIES.value))
  found = _neighbors(rng, _QUERIES.value, labels, queries, index)
  model = _model(rng, index, embeddings, found, asked)
  seconds = {part: np.zeros(2) for part in ("words, candidates and features", "trees", "ranking")}
  total = likely = 0
  for start in range(0, _QUERIES.value, _BLOCK.value):
    block = np.arange(start, min(start + _BLOCK.value, _QUERIES.value))
    times = [_now()]
    candidates, described = index.described(embeddings[block], found.take(block), asked[block])
    times.append(_now())
    scored = ScoredCandidates.score(model, candidates, described)
    times.append(_now())
    scored.ranked(100, propensity)
    times.append(_now())
    for name, value in zip(seconds, np.diff(times, axis=0), strict=True):
      seconds[name] += value
    total += len(candidates.values)
    likely += int((scored.probabilities >= LEAST_FOR_ALL).sum())
  for name, value in (seconds | {"all": sum(seconds.values())}).items():
    clock, processor = 1000 * value / _QUERIES.value
    print(f"{name}: {clock:.2f} ms a query, {processor:.2f} ms of processors")
  print(
    f"{total / _QUERIES.value:.0f} candidates a query, {likely / _QUERIES.value:.0f} of them pass all models of trees"
  )
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"memory of the process: {peak:.2f} GiB at most, what makes the synthetic data included")


def _model(
  rng: np.random.Generator, index: BlendIndex, embeddings: np.ndarray, found: Neighbors, asked: scipy.sparse.csr_array
) -> BlendModel:
  """Returns trees for which `_LIKELY` candidates of a query are likely: those of the best scores by prototype."""
  first = np.arange(min(64, _QUERIES.value))
  _, described = index.described(embeddings[first], found.take(first), asked[first])
  rank = described[:, FEATURES.index("prototype_rank")]
  hits = (rank < _LIKELY) & (rng.random(len(rank)) < 0.1)
  return BlendModel.fit(described, hits)


def _now() -> tuple[float, float]:
  """Returns the seconds of a clock and the processor seconds of this process."""
  return time.perf_counter(), time.process_time()


if __name__ == "__main__":
  app.run(main)
