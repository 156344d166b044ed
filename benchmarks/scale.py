"""Prints seconds and peak memory of the stages between raw files and the first step, for LF-AmazonTitles-1.3M.

  .venv/bin/python benchmarks/synthetic_1_3m.py --output=RAW
  .venv/bin/python benchmarks/scale.py --raw_dir=RAW --data_dir=DATA --tokenizer=FOLDER [--stages=order,mine,...]

`prepare` (raw files to TFDS) and `tokenize` always run. The other stages are `order` (order of an epoch), `batches`
(labels drawn, in-batch positives, packing), `pack` (all training queries), `mine` (balanced clusters of 16),
`centroids`, `exact` (index and 1,024 queries) and `scann` (the same). Embeddings are synthetic unit vectors in 50,000
groups, because clusters of random vectors have no meaning.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
import resource
import threading
import time
from typing import Any

from absl import app, flags
import numpy as np

from vixml_jax import datasets
from vixml_jax.input.batches import TrainingQueries, make_batch
from vixml_jax.input.corpus import Corpus, load_corpus
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.mining.order import epoch_order, num_query_clusters
from vixml_jax.search.index import make_index

_STAGES = ("order", "batches", "pack", "mine", "centroids", "exact", "scann")
_RAW_DIR = flags.DEFINE_string("raw_dir", None, "Raw folder; needed until the data set is prepared.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder for the prepared data set.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder of a fast tokenizer.", required=True)
_DATASET = flags.DEFINE_string("dataset", "lf_amazon_titles_1_3m", "Name of the data set; `custom` for other sizes.")
_DIM = flags.DEFINE_integer("dim", 384, "Width of the embeddings.")
_CHOSEN = flags.DEFINE_list("stages", list(_STAGES), "Stages to run after `tokenize`.")
_LAYOUT = PackedLayout(128, 64)
_BATCH = 2048


class _PeakMemory:
  """Peak resident memory of this process while a stage runs, sampled ten times a second."""

  def __enter__(self) -> "_PeakMemory":
    self.peak, self._running = 0, True
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    self._start = time.perf_counter()
    return self

  def __exit__(self, *exception: object) -> None:
    self.seconds = time.perf_counter() - self._start
    self._running = False
    self._thread.join()

  def _watch(self) -> None:
    while self._running:
      pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
      self.peak = max(self.peak, pages * resource.getpagesize())
      time.sleep(0.1)


def _stage(name: str, work: Callable[[], Any], note: Callable[[Any], str] = lambda result: "") -> Any:
  """Runs a stage, prints its time and memory, and returns its result."""
  with _PeakMemory() as memory:
    result = work()
  print(f"{name:<10} {memory.seconds:8.1f} s   peak RSS {memory.peak / 2**30:5.2f} GiB   {note(result)}", flush=True)
  return result


def _embeddings(rows: int, seed: int) -> np.ndarray:
  """Returns float32 [rows, D] of unit norm in 50,000 groups."""
  rng = np.random.default_rng(0)
  centers = rng.standard_normal((50_000, _DIM.value), np.float32)
  rng = np.random.default_rng(seed)
  out = np.empty((rows, _DIM.value), np.float32)
  for start in range(0, rows, 65_536):
    part = out[start : start + 65_536]
    part[:] = centers[rng.integers(0, len(centers), len(part))]
    part += rng.standard_normal(part.shape, np.float32)
    part /= np.linalg.norm(part, axis=1, keepdims=True)
  return out


def _batches(corpus: Corpus, order: np.ndarray, count: int) -> int:
  data = TrainingQueries(
    Items.of_texts(corpus.train_tokens),
    corpus.train_labels,
    Items.of_texts(corpus.label_tokens),
    np.ones(corpus.num_labels),
  )
  return sum(
    make_batch(data, order, _BATCH, _LAYOUT, seed=0, epoch=0, step=step).items.num_tokens for step in range(count)
  )


def _pack_all(corpus: Corpus) -> tuple[int, int]:
  rows, block = 0, 16_384
  for start in range(0, len(corpus.train_tokens), block):
    ids = np.arange(start, min(start + block, len(corpus.train_tokens)))
    packed = pack(Items.of_texts(corpus.train_tokens.take(ids)), _LAYOUT, round_up=False)
    rows += packed.tokens.shape[0] * _LAYOUT.chunk_rows
  return rows, len(corpus.train_tokens.values)


def main(argv: Sequence[str]) -> None:
  """Runs the stages in order."""
  del argv
  chosen = _CHOSEN.value
  builder = _stage("prepare", lambda: datasets.prepare(_DATASET.value, _RAW_DIR.value, _DATA_DIR.value))
  corpus = _stage(
    "tokenize",
    lambda: load_corpus(builder, Tokenizer(_TOKENIZER.value, 32), None, Path(_DATA_DIR.value) / "tokens"),
    lambda c: (
      f"{len(c.train_tokens):,} + {len(c.test_tokens):,} queries, {c.num_labels:,} labels, "
      f"{len(c.train_labels.values):,} pairs"
    ),
  )
  queries, labels = len(corpus.train_tokens), corpus.num_labels
  order = np.arange(queries)
  if "order" in chosen:
    order = _stage("order", lambda: epoch_order(0, 0, queries))
  if "batches" in chosen:
    _stage("batches", lambda: _batches(corpus, order, 50), lambda tokens: f"50 batches of {_BATCH}, {tokens:,} tokens")
  if "pack" in chosen:
    _stage(
      "pack",
      lambda: _pack_all(corpus),
      lambda found: (
        f"{found[0]:,} rows of {_LAYOUT.row_length}, {100 * found[1] / found[0] / _LAYOUT.row_length:.1f} % filled"
      ),
    )
  if {"mine", "centroids"} & set(chosen):
    bank = _stage("(bank)", lambda: _embeddings(queries, 1))
    if "mine" in chosen:
      count = num_query_clusters(queries, 16)
      clusters = _stage(
        "mine", lambda: balanced_kmeans(bank, count, seed=0), lambda _: f"{count:,} clusters of about 16"
      )
      _stage("order", lambda: epoch_order(0, 11, queries, clusters), lambda _: "by clusters")
    if "centroids" in chosen:
      _stage("centroids", lambda: np.asarray(label_centroids(bank, corpus.train_labels, labels)))
    del bank
  if {"exact", "scann"} & set(chosen):
    vectors, searched = _embeddings(labels, 2), _embeddings(1024, 3)
    for kind in ("exact", "scann"):
      if kind in chosen:
        index = _stage(f"{kind} index", lambda kind=kind: make_index(kind, vectors))
        _stage(f"{kind} 1024", lambda index=index: index.search(searched, 100), lambda _: "queries, top 100")


if __name__ == "__main__":
  app.run(main)
