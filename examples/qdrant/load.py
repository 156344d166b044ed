"""Loads label vectors into Qdrant, and compares its answers with exact search.

  python -m vixml_jax.export --workdir=runs/NAME --format=label-vectors --output=vectors
  pip install qdrant-client pyarrow
  python examples/qdrant/load.py --vectors=vectors --url=http://HOST:6333

--url=:memory: tries it out without a server, and --path=DIR keeps the labels in a folder, which takes hundredths of a
second for each. A point has the id of its label, and uid, text and, if labels have any, categories as payload.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

_ROWS_AT_ONCE = 256


def load(client: QdrantClient, folder: Path, collection: str) -> int:
  """Replaces the collection by the labels of `folder/labels.parquet`, and returns their number."""
  labels = pq.ParquetFile(folder / "labels.parquet")
  vector = labels.schema_arrow.field("vector").type
  half = pa.types.is_float16(vector.value_type)
  client.delete_collection(collection)
  client.create_collection(
    collection,
    vectors_config=models.VectorParams(
      size=vector.list_size,
      distance=models.Distance.DOT,
      datatype=models.Datatype.FLOAT16 if half else models.Datatype.FLOAT32,
    ),
  )
  for points in _batches(labels):
    client.upsert(collection, points)
  return labels.metadata.num_rows


def _batches(labels: pq.ParquetFile) -> Iterator[models.Batch]:
  for batch in labels.iter_batches(_ROWS_AT_ONCE):
    yield models.Batch(
      ids=batch["id"].to_pylist(),
      vectors=as_vectors(batch["vector"]),
      payloads=batch.drop_columns(["id", "vector"]).to_pylist(),
    )


def as_vectors(column: pa.Array) -> list[list[float]]:
  """Returns the rows of a column of vectors."""
  return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32).tolist()


def search(
  client: QdrantClient, collection: str, vector: list[float], k: int, params: models.SearchParams | None = None
) -> list[tuple[str, float]]:
  """Returns uid and inner product of the k best labels of a query.

  Args:
    client: Client of a server, which searches by its index, or without a server, which searches exactly.
    collection: Name of the collection.
    vector: Embedding of the query.
    k: Number of labels.
    params: Settings of a server's search, such as `models.SearchParams(exact=True)`.
  """
  found = client.query_points(collection, query=vector, limit=k, search_params=params, with_payload=["uid"])
  return [(point.payload["uid"], point.score) for point in found.points]


def compare(
  client: QdrantClient, folder: Path, collection: str, params: models.SearchParams | None = None
) -> tuple[int, float, int]:
  """Compares answers with those of `folder/queries.parquet`.

  Returns:
    The number of queries with the same labels in the same order (labels whose scores are equal to five digits may
    change places), the share of the labels that were found, and the number of queries.
  """
  queries = pq.read_table(folder / "queries.parquet")
  same, shares = 0, []
  for vector, best, scores in zip(
    as_vectors(queries["vector"].combine_chunks()),
    queries["best"].to_pylist(),
    queries["scores"].to_pylist(),
    strict=True,
  ):
    found = search(client, collection, vector, len(best), params)
    uids = [uid for uid, _ in found]
    shares.append(len({*uids} & {*best}) / len(best))
    same += uids == best or np.allclose([score for _, score in found], scores, rtol=0, atol=1e-5)
  return same, float(np.mean(shares)), len(queries)


def main() -> None:
  """Loads the vectors and prints how the answers compare."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--vectors", type=Path, required=True, help="Folder that export wrote.")
  place = parser.add_mutually_exclusive_group(required=True)
  place.add_argument("--path", help="Folder of a collection without a server.")
  place.add_argument("--url", help="Address of a server, or :memory:.")
  parser.add_argument("--collection", default="labels", help="Collection to write; one of this name is replaced.")
  flags = parser.parse_args()
  try:
    client = QdrantClient(path=flags.path) if flags.path else QdrantClient(flags.url)
    print(f"{load(client, flags.vectors, flags.collection):,} labels in collection {flags.collection}")
    searches: dict[str, models.SearchParams | None] = {"exact search": None}
    if not flags.path and flags.url != ":memory:":
      searches = {"exact search": models.SearchParams(exact=True), "HNSW index": None}
    for name, params in searches.items():
      same, share, number = compare(client, flags.vectors, flags.collection, params)
      print(f"{name}: the same ten best labels for {same} of {number} queries, {share:.1%} of the labels")
    client.close()
  except (OSError, ValueError, RuntimeError, ApiException) as error:
    sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
  main()
