"""The interface of all label indexes, and search that leaves out given labels."""

from typing import Protocol

import jax
from jax.sharding import Mesh
import numpy as np
import tqdm

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.rounding import next_power_of_two
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.membership import drop_members
from vixml_jax.search.scann_index import ScannIndex

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
  kind: str, embeddings: np.ndarray | jax.Array, mesh: Mesh | None = None, rows: np.ndarray | None = None
) -> Index:
  """Returns an index of the label embeddings.

  Args:
    kind: "exact" (on the accelerators, sharded over the mesh) or "scann" (on the CPU, approximate).
    embeddings: Label embeddings [L, D].
    mesh: Devices of the exact index; None uses all devices.
    rows: Ids of the labels to search, ascending; the embeddings must then be a NumPy array. None searches all labels.

  Raises:
    InputError: There is no such kind, or ScaNN cannot run here.
  """
  if kind == "exact":
    return ExactIndex(embeddings, mesh, rows=rows)
  if kind == "scann":
    return ScannIndex(embeddings, rows=rows)
  raise InputError(f"search={kind!r} is not known: use one of {', '.join(KINDS)}")


def search_excluding(
  index: Index, queries: np.ndarray | jax.Array, k: int, exclude: Ragged | None, *, query_chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k best labels of each query without its excluded labels, which are dropped before the cut at k.

  Each chunk of queries is searched for k + e labels, where e is the most labels that a query of the chunk excludes, and
  excluded labels are then dropped. At most e of the k + e are excluded, so at least k remain, and no other label scores
  higher than these: the first k that remain are the k best of all labels that are not excluded. (A cut at k before the
  filter would leave fewer than k.) e is rounded up to a power of two, so that few widths are compiled. If k + e exceeds
  L, all labels are searched. For an approximate index, the same holds among the labels that it finds.

  A progress bar is shown on a terminal.

  Args:
    index: Index of the labels.
    queries: Queries [Q, D].
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
  with tqdm.tqdm(total=len(queries), desc="search", unit="query", disable=None, leave=False) as progress:
    for start in range(0, len(queries), query_chunk):
      rows = slice(start, min(start + query_chunk, len(queries)))
      excluded = None if exclude is None else exclude.take(np.arange(rows.start, rows.stop))
      scores[rows], ids[rows] = _search_chunk(index, queries[rows], k, excluded)
      progress.update(rows.stop - rows.start)
  return scores, ids


def _search_chunk(
  index: Index, queries: np.ndarray | jax.Array, k: int, exclude: Ragged | None
) -> tuple[np.ndarray, np.ndarray]:
  if exclude is None or not len(exclude.values):
    return index.search(queries, k)
  most = int(exclude.lengths.max())
  width = max(k, min(k + next_power_of_two(most), index.num_labels))
  return drop_members(*index.search(queries, width), exclude, k)
