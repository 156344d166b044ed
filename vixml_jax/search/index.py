"""The interface of all label indexes, and search that leaves out given labels."""

import logging
from typing import Protocol

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.rounding import next_power_of_two
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.membership import drop_members
from vixml_jax.search.scann_index import ScannIndex
from vixml_jax.search.scann_recall import RecallGoal, reach_recall
from vixml_jax.sharded_rows import ShardedRows

_log = logging.getLogger(__name__)

KINDS = ("exact", "scann")


class Index(Protocol):
  """Maximum inner product search over L label embeddings."""

  @property
  def num_labels(self) -> int:
    """Number of labels that are searched."""

  def search(self, queries: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores float32 [Q, K], in descending order, and ids int32 [Q, K] of the best labels of queries [Q, D].

    Score -inf and id -1 fill the places of a query for which fewer than k labels were found.
    """


def make_index(
  kind: str,
  embeddings: np.ndarray | jax.Array | ShardedRows,
  mesh: Mesh | None = None,
  rows: np.ndarray | None = None,
  allowed: np.ndarray | None = None,
  goal: RecallGoal | None = None,
) -> Index:
  """Returns an index of the label embeddings.

  Args:
    kind: "exact" (on the accelerators, sharded over the mesh) or "scann" (on the CPU, approximate).
    embeddings: Label embeddings [L, D]. ScaNN copies sharded rows whole to the host of every process.
    mesh: Devices of the exact index; None uses all devices. Sharded rows are searched on their own mesh.
    rows: Ids of the labels to search, ascending; the embeddings must then be a NumPy array. None searches all labels.
    allowed: bool [L], the labels that may be found; None for all. Give either `rows` or `allowed`.
    goal: Recall that ScaNN must reach, for which its settings of search are chosen; None takes those of
      `choose_parameters`.

  Raises:
    InputError: There is no such kind, or ScaNN cannot run here.
  """
  if kind == "exact":
    return ExactIndex(embeddings, mesh, rows=rows, allowed=allowed)
  if kind == "scann":
    on_host = rows_on_host(embeddings) if isinstance(embeddings, ShardedRows) else embeddings
    scann = ScannIndex(on_host, rows=rows if allowed is None else np.flatnonzero(allowed))
    if goal is not None and scann.parameters.reorder:  # Without reordering it is brute force, which finds everything.
      reach_recall(scann, ExactIndex(embeddings, mesh, rows=rows, allowed=allowed), goal)
    return scann
  raise InputError(f"search={kind!r} is not known: use one of {', '.join(KINDS)}")


def rows_on_host(rows: ShardedRows) -> np.ndarray:
  """Returns all rows on the host of every process, float32 [L, D]."""
  _log.info("copying %s embeddings of %d dimensions to the host", f"{len(rows):,}", rows.shape[1])
  host = np.empty(rows.shape, np.float32)
  for start, block in rows.blocks():
    host[start : start + len(block)] = block
  return host


def search_excluding(
  index: Index,
  queries: np.ndarray | jax.Array | ShardedRows,
  k: int,
  exclude: Ragged | None,
  *,
  query_chunk: int = 4096,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k best labels of each query without its excluded labels, which are dropped before the cut at k.

  Each chunk of queries is searched for k + e labels, where e is the most labels that a query of the chunk excludes, and
  excluded labels are then dropped. At most e of the k + e are excluded, so at least k remain, and no other label scores
  higher than these: the first k that remain are the k best of all labels that are not excluded. (A cut at k before the
  filter would leave fewer than k.) e is rounded up to a power of two, so that few widths are compiled. If k + e exceeds
  L, all labels are searched. For an approximate index, the same holds among the labels that it finds.

  Args:
    index: Index of the labels.
    queries: Queries [Q, D]. Of sharded rows, one chunk at a time is on the host.
    k: Number of labels to return for each query, at least 1.
    exclude: Ids of the labels to leave out for each query, Q rows; None leaves out none.
    query_chunk: Number of queries to search and filter at once.

  Returns:
    Scores float32 [Q, K] in descending order and ids int32 [Q, K]. Score -inf and id -1 fill the places of a query with
    fewer labels left.
  """
  if exclude is not None and len(exclude) != len(queries):
    raise ValueError(f"{len(queries)} queries but {len(exclude)} rows of exclusions")
  scores = np.empty((len(queries), k), np.float32)
  ids = np.empty((len(queries), k), np.int32)
  for start in range(0, len(queries), query_chunk):
    rows = slice(start, min(start + query_chunk, len(queries)))
    excluded = None if exclude is None else exclude.take(np.arange(rows.start, rows.stop))
    scores[rows], ids[rows] = _search_chunk(index, query_block(queries, start, query_chunk), k, excluded)
  return scores, ids


def query_block(queries: np.ndarray | jax.Array | ShardedRows, start: int, size: int) -> np.ndarray | jax.Array:
  """Returns at most `size` queries from `start` on; those of sharded rows are copied to the host of every process."""
  if isinstance(queries, ShardedRows):
    # The last block has the size of the others, so that one program reads all of them.
    return np.asarray(queries.block(start, min(size, len(queries))))[: len(queries) - start]
  return queries[start : start + size]


def search_width(k: int, exclude: Ragged | None, num_labels: int) -> int:
  """Returns the number of labels to search for so that k remain without the excluded ones; see `search_excluding`."""
  if exclude is None or not len(exclude.values):
    return k
  return max(k, min(k + next_power_of_two(int(exclude.lengths.max())), num_labels))


def _search_chunk(
  index: Index, queries: np.ndarray | jax.Array, k: int, exclude: Ragged | None
) -> tuple[np.ndarray, np.ndarray]:
  found = index.search(queries, search_width(k, exclude, index.num_labels))
  return found if exclude is None else drop_members(*found, exclude, k)
