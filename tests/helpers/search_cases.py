"""Label embeddings, brute-force search and small label indexes for tests of search."""

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from vixml_jax.ragged import Ragged
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.label_index_files import IndexContents, write_index
from vixml_jax.search.scann_index import ScannParameters, scann_available

CHECKPOINT = {"step": 7, "sha256": "ab" * 32}
OTHER_CHECKPOINT = {"step": 9, "sha256": "cd" * 32}
RETRIEVAL = {"lambda": 0.9, "temperature": 0.05, "hits": 10}
NUM_LABELS, NUM_TRAIN, DIM = 60, 40, 8
TREE = ScannParameters(leaves=8, leaves_to_search=8, reorder=50, dimensions_per_block=2, soar=True, bfloat16=False)

needs_scann = pytest.mark.skipif(not scann_available()[0], reason=scann_available()[1])
both_kinds = pytest.mark.parametrize("search", ["exact", pytest.param("scann", marks=needs_scann)])


def mesh_of_two():
  return Mesh(np.asarray(jax.devices()[:2]), ("data",))


def integers(rows, seed, dim=6):
  """Small whole numbers: their inner products are exact in float32, and many of them are equal."""
  return np.random.default_rng(seed).integers(-2, 3, (rows, dim)).astype(np.float32)


def normal(rows, seed, dim=6):
  return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def unit(rows, seed, dim=DIM):
  points = normal(rows, seed, dim)
  return points / np.linalg.norm(points, axis=1, keepdims=True)


def brute_force(labels, queries, k, permitted=None):
  """Scores and ids of the k best labels, of those of each query in `permitted` [Q, L] if it is given."""
  scores = queries.astype(np.float64) @ np.asarray(labels, np.float64).T
  if permitted is not None:
    scores = np.where(permitted, scores, -np.inf)
  ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  scores = np.take_along_axis(scores, ids, axis=1).astype(np.float32)
  ids = np.where(scores == -np.inf, -1, ids)
  missing = ((0, 0), (0, k - ids.shape[1]))
  return np.pad(scores, missing, constant_values=-np.inf), np.pad(ids, missing, constant_values=-1)


def index_contents(num_labels=NUM_LABELS, **changes):
  ids = range(num_labels)
  contents = dict(
    embeddings=unit(num_labels, 0),
    texts=[f"label {i} é ü" for i in ids],
    uids=[f"u/{i}" for i in ids],
    label_clusters=np.arange(num_labels, dtype=np.int32) % 4,
    cluster_means=unit(4, 1),
    queries=unit(NUM_TRAIN, 2),
    query_labels=Ragged.from_rows([[i % num_labels, (7 * i + 1) % num_labels] for i in range(NUM_TRAIN)]),
    query_texts=[f"query {i} ß" for i in range(NUM_TRAIN)],
    categories=[["even" if i % 2 == 0 else "odd", *(["third"] if i % 3 == 0 else [])] for i in ids],
  )
  if changes.get("queries", True) is None:
    changes["query_texts"] = None
  return IndexContents(**contents | changes)


def filters_and_mask(index):
  """Filters of five queries on an index without labels 4 and 6, and bool [5, L], the labels that each may have."""
  filters = index.filters(
    allow=[None, ["u/3", "u/4", "u/9"], None, [], ["u/2", "u/3", "u/8", "u/9"]],
    deny=[("u/0", "u/4"), None, ["u/1"], None, ["u/9"]],
    categories=[None, None, ["third"], None, ["even", "third"]],
  )
  live = set(range(NUM_LABELS)) - {4, 6}
  permitted = [live - {0}, {3, 9}, {i for i in live if i % 3 == 0}, set(), {2, 3, 8}]
  return filters, np.asarray([[label in row for label in range(NUM_LABELS)] for row in permitted])


def written(folder, search="exact", **changes):
  """Writes an index and returns its folder."""
  contents = index_contents(**changes)
  write_index(folder, contents, checkpoint=CHECKPOINT, search=search, mesh=mesh_of_two(), retrieval=RETRIEVAL)
  return folder


def opened(folder, **changes):
  return LabelIndex.open(folder, **dict(checkpoint=CHECKPOINT, mesh=mesh_of_two()) | changes)
