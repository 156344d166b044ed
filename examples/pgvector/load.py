"""Loads label vectors into PostgreSQL with pgvector, and compares its answers with exact search.

  python -m vixml_jax.export --workdir=runs/NAME --format=label-vectors --output=vectors
  pip install 'psycopg[binary]' pgvector pyarrow
  python examples/pgvector/load.py --vectors=vectors --url=postgresql://USER:PASSWORD@HOST/DATABASE

The table has the columns id, uid, text, vector and, if labels have any, categories. It has an HNSW index for the inner
product. Rows that an earlier call wrote are replaced in one transaction.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
import sys

import numpy as np
from pgvector import HalfVector
from pgvector.psycopg import register_vector
import psycopg
from psycopg import sql
import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_AT_ONCE = 4096
# The most numbers of a vector that an HNSW index of pgvector takes.
_MOST_INDEXED = {"vector": 2000, "halfvec": 4000}


def load(connection: psycopg.Connection, folder: Path, table: str) -> int:
  """Replaces the table by the labels of `folder/labels.parquet`, and returns their number."""
  labels = pq.ParquetFile(folder / "labels.parquet")
  vector = labels.schema_arrow.field("vector").type
  kind = "halfvec" if pa.types.is_float16(vector.value_type) else "vector"
  if vector.list_size > _MOST_INDEXED[kind]:
    raise ValueError(
      f"{folder}: vectors have {vector.list_size} numbers; an index of {kind} takes {_MOST_INDEXED[kind]}"
    )
  types = {"id": "integer", "uid": "text", "text": "text", "vector": kind, "categories": "text[]"}
  columns = [name for name in types if name in labels.schema_arrow.names]
  declared = [
    sql.SQL("{} {} NOT NULL").format(
      sql.Identifier(name), sql.SQL(f"{kind}({vector.list_size})" if name == "vector" else types[name])
    )
    for name in columns
  ]
  names = sql.SQL(", ").join(map(sql.Identifier, columns))
  with connection.transaction():
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    cursor = connection.cursor()
    cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(table)))
    cursor.execute(
      sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY (id), UNIQUE (uid))").format(
        sql.Identifier(table), sql.SQL(", ").join(declared)
      )
    )
    copy = sql.SQL("COPY {} ({}) FROM STDIN WITH (FORMAT BINARY)").format(sql.Identifier(table), names)
    with cursor.copy(copy) as rows:
      rows.set_types([types[name].replace("integer", "int4") for name in columns])
      for row in _rows(labels, columns):
        rows.write_row(row)
    # Built after the rows are there, which is faster than row by row.
    cursor.execute(
      sql.SQL("CREATE INDEX ON {} USING hnsw (vector {})").format(sql.Identifier(table), sql.SQL(f"{kind}_ip_ops"))
    )
  return labels.metadata.num_rows


def _rows(labels: pq.ParquetFile, columns: list[str]) -> Iterator[list]:
  for batch in labels.iter_batches(_ROWS_AT_ONCE, columns=columns):
    values = {name: batch[name].to_pylist() for name in columns if name != "vector"}
    values["vector"] = as_vectors(batch["vector"])
    yield from map(list, zip(*(values[name] for name in columns), strict=True))


def as_vectors(column: pa.Array) -> list:
  """Returns the rows of a column of vectors in the types that pgvector takes."""
  rows = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
  return [HalfVector(row) for row in rows] if rows.dtype == np.float16 else list(rows)


def search(
  connection: psycopg.Connection, table: str, vector: object, k: int, exact: bool = False, ef_search: int = 100
) -> list[tuple[str, float]]:
  """Returns uid and inner product of the k best labels of a query, by the HNSW index or by exact search.

  Args:
    connection: Connection to the database.
    table: Name of the table.
    vector: Embedding of the query, from `as_vectors`.
    k: Number of labels.
    exact: Whether to compare the query with every label.
    ef_search: Number of labels that the index keeps while it searches, at least k. More are slower and more accurate.
  """
  # <#> is the negative inner product, because indexes sort in ascending order.
  statement = sql.SQL("SELECT uid, -(vector <#> %(query)s) FROM {} ORDER BY vector <#> %(query)s LIMIT %(k)s").format(
    sql.Identifier(table)
  )
  with connection.transaction(), connection.cursor() as cursor:
    cursor.execute(f"SET LOCAL enable_indexscan = {'off' if exact else 'on'}")
    cursor.execute(f"SET LOCAL hnsw.ef_search = {int(ef_search)}")
    return cursor.execute(statement, {"query": vector, "k": k}).fetchall()


def compare(connection: psycopg.Connection, folder: Path, table: str, exact: bool) -> tuple[int, float, int]:
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
    found = search(connection, table, vector, len(best), exact)
    uids = [uid for uid, _ in found]
    shares.append(len({*uids} & {*best}) / len(best))
    same += uids == best or np.allclose([score for _, score in found], scores, rtol=0, atol=1e-5)
  return same, float(np.mean(shares)), len(queries)


def main() -> None:
  """Loads the vectors and prints how the answers compare."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--vectors", type=Path, required=True, help="Folder that export wrote.")
  parser.add_argument("--url", required=True, help="Connection string of the database.")
  parser.add_argument("--table", default="labels", help="Table to write; one of this name is replaced.")
  flags = parser.parse_args()
  try:
    with psycopg.connect(flags.url) as connection:
      print(f"{load(connection, flags.vectors, flags.table):,} labels in table {flags.table}")
      for name, exact in (("exact search", True), ("HNSW index", False)):
        same, share, number = compare(connection, flags.vectors, flags.table, exact)
        print(f"{name}: the same ten best labels for {same} of {number} queries, {share:.1%} of the labels")
  except (OSError, ValueError, psycopg.Error) as error:
    sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
  main()
