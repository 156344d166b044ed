"""Writes the vectors of the labels as Parquet, for vector databases and other search systems."""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.run.checkpoint import checkpoint_id, newest_checkpoint
from vixml_jax.run.workdir import CHECKPOINTS, INDEX
from vixml_jax.search.host_search import search_rows, top_k_positions
from vixml_jax.search.label_index_files import IndexFiles, open_current
from vixml_jax.search.prefixes import ScaledPrefixes, release_rows
from vixml_jax.search.vector_form import VectorForm

LABELS, QUERIES = "labels.parquet", "queries.parquet"

_Vectors = np.ndarray | ScaledPrefixes

METADATA_KEY = b"vixml_jax"
METRIC = "inner_product"
"""By which a vector database must rank. Cosine ranks in another way, where vectors contain a share of classifiers."""

_GROUP_BYTES = 1 << 24  # Of the vectors of a row group. Readers and this writer hold one group in memory.
_MOST_QUERIES = 100
_BEST = 10


def write_label_vectors(
  workdir: Path, folder: Path, dtype: str = "float32", dims: int | None = None, group_bytes: int = _GROUP_BYTES
) -> dict[str, Any]:
  """Writes `labels.parquet` with the labels that are not deleted, and `queries.parquet` to check a search with.

  `labels.parquet` has the columns `id` (ascending), `uid`, `text`, `vector` (a list of fixed size) and, if any label
  has some, `categories`. `queries.parquet` has up to 100 vectors of queries that were not trained on, and the uids and
  scores of their ten best labels by exact search over the float32 vectors; an index without such queries has no such
  file. The metadata of both files have a JSON object under the key `vixml_jax`.

  Args:
    workdir: Folder that training, or `vixml_jax.evaluate`, wrote.
    folder: Folder to write the files to.
    dtype: Type of the vectors, one of `DTYPES_OF["label-vectors"]`.
    dims: Number of first dimensions of the vectors, which get the norm of the whole ones; None for all. The model
      should have been trained with it among `train.matryoshka_dims`.
    group_bytes: Size of the vectors of a row group.

  Returns:
    The metadata, with the number of queries as `num_queries`.

  Raises:
    InputError: There is no index, or a file of it is damaged.
  """
  step, _ = newest_checkpoint(workdir / CHECKPOINTS)
  checkpoint = checkpoint_id(workdir / CHECKPOINTS, step)
  files = open_current(workdir / INDEX, lambda found: found, checkpoint=checkpoint, verify=True)
  form = VectorForm(dims=dims)
  vectors, live = form.vectors(files.embeddings), np.flatnonzero(~files.deleted)
  dim = vectors.shape[1]
  held_out = np.zeros((0, dim)) if files.held_out is None else files.held_out[:_MOST_QUERIES]
  queries = np.asarray(form.queries(held_out), np.float32)
  metadata = {
    "metric": METRIC,
    "dim": dim,
    "dtype": dtype,
    "num_labels": len(live),
    "model": checkpoint,
    "index": {"snapshot": files.snapshot.path.name, "edits": files.info["edits"]},
  }
  if dims is not None:
    metadata["first_of"] = files.embeddings.shape[1]
  vector = pa.list_(pa.field("element", pa.float32() if dtype == "float32" else pa.float16(), nullable=False), dim)
  rows = max(group_bytes // (dim * np.dtype(dtype).itemsize), 1)
  _write_labels(files, vectors, live, folder / LABELS, vector, metadata, rows)
  if len(queries):
    _write_queries(files, vectors, live, queries, folder / QUERIES, vector, metadata, rows)
  found = {"num_queries": len(queries), "has_categories": files.categories is not None, "first_of": None}
  return found | metadata


def _write_labels(
  files: IndexFiles,
  vectors: _Vectors,
  live: np.ndarray,
  path: Path,
  vector: pa.DataType,
  metadata: dict[str, Any],
  group_rows: int,
) -> None:
  columns = [
    pa.field("id", pa.int32(), nullable=False),
    pa.field("uid", pa.string(), nullable=False),
    pa.field("text", pa.string(), nullable=False),
    pa.field("vector", vector, nullable=False),
  ]
  if files.categories is not None:
    columns.append(pa.field("categories", pa.list_(pa.string()), nullable=False))
  schema = pa.schema(columns, metadata={METADATA_KEY: json.dumps(metadata)})
  # No value repeats often enough for a dictionary.
  with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=["id", "uid"]) as table:
    for block in _blocks(live, group_rows):
      arrays = [
        pa.array(block, pa.int32()),
        pa.array(files.uids.take(block)),
        pa.array(files.texts.take(block)),
        _vectors(vectors[block], vector),
      ]
      if files.categories is not None:
        names = files.category_names
        rows = files.categories.take(block)
        arrays.append(pa.array([[names[place] for place in rows[i]] for i in range(len(rows))], pa.list_(pa.string())))
      table.write_batch(pa.record_batch(arrays, schema=schema), row_group_size=group_rows)
      release_rows(vectors)


def _write_queries(
  files: IndexFiles,
  vectors: _Vectors,
  live: np.ndarray,
  queries: np.ndarray,
  path: Path,
  vector: pa.DataType,
  metadata: dict[str, Any],
  block_rows: int,
) -> None:
  scores, ids = _best_labels(vectors, live, queries, block_rows)
  table = pa.table(
    {
      "vector": _vectors(queries, vector),
      "best": pa.array([files.uids.take(row) for row in ids]),
      "scores": pa.array(list(scores)),
    },
    metadata={METADATA_KEY: json.dumps(metadata)},
  )
  pq.write_table(table, path)


def _best_labels(
  vectors: _Vectors, live: np.ndarray, queries: np.ndarray, block_rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns scores and ids of the best labels of each query, [Q, K]; a block of labels is in memory at a time."""
  scores, ids = (np.zeros((len(queries), 0), dtype) for dtype in (np.float32, np.int32))
  for block in _blocks(live, block_rows):
    found = search_rows(vectors, block, queries, min(_BEST, len(block)))
    release_rows(vectors)
    scores, ids = (np.concatenate(parts, axis=1) for parts in zip((scores, ids), found, strict=True))
    best = top_k_positions(scores, min(_BEST, scores.shape[1]))
    scores, ids = (np.take_along_axis(part, best, axis=1) for part in (scores, ids))
  return scores, ids


def _blocks(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
  return (ids[start : start + size] for start in range(0, len(ids), size))


def _vectors(rows: np.ndarray, vector: pa.DataType) -> pa.Array:
  values = np.ascontiguousarray(rows, vector.value_type.to_pandas_dtype())
  return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=vector)
