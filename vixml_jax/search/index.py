"""The interface that all label indexes share, and search that leaves out given labels."""

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
    """How many labels are searched."""

  def search(self, queries: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """[Q, D] -> scores float32 [Q, K], descending, and ids int32 [Q, K].

    Score -inf and id -1 stand where there are fewer than k.
    """


def make_index(
  kind: str, embeddings: np.ndarray | jax.Array, mesh: Mesh | None = None, rows: np.ndarray | None = None
) -> Index:
  """An index of the label embeddings.

  Args:
    kind: "exact" (on the accelerator, sharded over the mesh) or "scann" (on CPU, approximate).
    embeddings: [L, D].
    mesh: devices of the exact index; None takes all of them.
    rows: ascending ids of the labels to search, of embeddings that are a NumPy array; None takes all of them.

  Raises:
    InputError: if there is no such kind, or ScaNN cannot run here.
  """
  if kind == "exact":
    return ExactIndex(embeddings, mesh, rows=rows)
  if kind == "scann":
    return ScannIndex(embeddings, rows=rows)
  raise InputError(f"search={kind!r} is not known: use one of {', '.join(KINDS)}")


def search_excluding(
  index: Index, queries: np.ndarray | jax.Array, k: int, exclude: Ragged | None, *, query_chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
  """The k best of the labels that a query may have, filtered before the cut at k.

  Each chunk of queries is searched for k + e labels, e being the most labels that any
  of its queries excludes, and the excluded are then dropped. At most e of the k + e are
  excluded, so at least k remain; and every label that is not among them scores no higher
  than all of them, so the first k that remain are the k best of all that are not
  excluded. (Cutting at k first and filtering then would leave fewer than k.) e is rounded
  up to a power of two, so that few widths are compiled. If k + e exceeds L, all labels
  are searched, and what is missing has score -inf, id -1. With an approximate index the
  same holds for the labels that it finds.

  Shows a progress bar on a terminal.

  Args:
    index: the index.
    queries: [Q, D].
    k: how many labels, at least 1.
    exclude: for each query the label ids to leave out, Q rows; None leaves out nothing.
    query_chunk: queries to search and filter at once.

  Returns:
    scores float32 [Q, K], descending, and ids int32 [Q, K].
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


def _search_chunk(index: Index, queries, k: int, exclude: Ragged | None):
  if exclude is None or not len(exclude.values):
    return index.search(queries, k)
  most = int(exclude.lengths.max())
  width = max(k, min(k + next_power_of_two(most), index.num_labels))
  return drop_members(*index.search(queries, width), exclude, k)
