"""The programs of a run that encode items, cluster, average and search embeddings; `programs` lists when they run."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from vixml_jax import sharded_rows, sharding
from vixml_jax.ahead_of_time.plan import Plan, bytes_a_chip
from vixml_jax.ahead_of_time.workload import item_lengths
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.evaluation.evaluate_model import evaluation_config
from vixml_jax.evaluation.evaluator import QUERIES_PER_BLOCK
from vixml_jax.mining.centroids import LABEL_BLOCK, PAIR_BLOCK, mean_programs
from vixml_jax.mining.kmeans import lower_kmeans
from vixml_jax.rounding import next_power_of_two
from vixml_jax.search.exact import QUERIES_PER_CHUNK, block_size, search_program

Lower = Callable[[], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Work:
  """Items that one run of a program encodes, on all chips together.

  Attributes:
    items: Number of items.
    tokens: Number of tokens of these items.
    lengths: Number of tokens of each item of the batch that stands for all items.
    trains: Whether the program also computes gradients.
  """

  items: float
  tokens: float
  lengths: np.ndarray
  trains: bool


@dataclasses.dataclass(frozen=True)
class RunProgram:
  """A program of a run, before it is compiled.

  Attributes:
    name: Name of the program, unique in a run.
    lower: Lowers the program.
    held: Bytes that a chip holds while the program runs: its arguments and all other arrays of the run.
    runs: How often the program runs.
    work: Items that it encodes; None for a program without encoder.
    key: Equal for programs that are one program, or differ only in the number of rows that they write into; None for a
      program of its own. The one with the most rows is compiled for all of them.
    rows: Bytes of these rows on a chip; 0 if all of the programs have the same.
  """

  name: str
  lower: Lower
  held: float
  runs: float
  work: Work | None = None
  key: tuple[Any, ...] | None = None
  rows: float = 0.0


class ProgramParts:
  """Makes the programs that several parts of a run share; the caller knows what else is in memory.

  Args:
    plan: The plan.

  Attributes:
    queries: Embeddings of the training queries.
    labels: Embeddings, pooled outputs or prototypes of the labels.
  """

  def __init__(self, plan: Plan):
    self._plan, self._mesh, self._size = plan, plan.mesh, plan.workload.size
    self._encoder = ItemEncoder(plan.workload.model, plan.workload.layout, self._mesh)
    self.queries, self.labels = plan.rows(plan.workload.size.train), plan.rows(plan.workload.size.labels)

  def search(
    self, held: float, number: int, queries: jax.ShapeDtypeStruct, *, masked: bool, prefix: str
  ) -> Iterator[RunProgram]:
    """Yields the programs that search for `number` queries, and that read them block by block.

    Queries whose excluded labels are many search a power of two more labels, which this list cannot know. One is
    assumed.
    """
    evaluation, excluded = evaluation_config(self._plan.workload.config.eval), next_power_of_two(1)
    block = self._plan.array((min(QUERIES_PER_BLOCK, max(number, 1)),), np.int32)
    yield RunProgram(
      f"{prefix}read queries",
      lambda: sharded_rows.take_program.lower(queries, block, mesh=self._mesh),
      held + bytes_a_chip(block),
      math.ceil(number / QUERIES_PER_BLOCK),
    )
    if self._plan.workload.config.eval.search != "exact":
      return
    width, hits = evaluation.depth + excluded, 0
    if evaluation.retrieval is not None:
      width, hits = max(width, evaluation.retrieval.hits), evaluation.retrieval.num_query_hits
    searches = {"search labels": (self.labels, self._size.labels, min(width, self._size.labels), False)}
    if hits:
      searches["search training queries"] = (self.queries, self._size.train, hits, masked)
    for name, (rows, count, k, has_mask) in searches.items():
      yield RunProgram(
        prefix + name,
        functools.partial(self._lower_search, rows, count, k, has_mask),
        held + (bytes_a_chip(self._masks(rows)) if has_mask else 0),
        math.ceil(number / QUERIES_PER_CHUNK),
        key=("search", rows.shape, count, k, has_mask),
      )

  def _lower_search(self, rows: jax.ShapeDtypeStruct, count: int, k: int, masked: bool) -> jax.stages.Lowered:
    block = block_size(rows.shape[0] // sharding.row_devices(self._mesh))
    queries = self._plan.array((QUERIES_PER_CHUNK, rows.shape[1]), np.float32)
    masks = (self._masks(rows), self._plan.array((QUERIES_PER_CHUNK,), np.int32)) if masked else ()
    return search_program(self._mesh, sharding.row_axes(), count, k, block, masked).lower(rows, queries, *masks)

  def _masks(self, rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return self._plan.array((1, rows.shape[0]), np.bool_, "vector", "label")

  def encode(
    self, name: str, number: int, held: float, *, normalized: bool = True, times: int = 1
  ) -> Iterator[RunProgram]:
    """Yields the program that encodes a chunk of `number` items into their rows."""
    plan, layout = self._plan, self._plan.workload.layout
    rows, ids = plan.rows(max(number, 1)), plan.array((layout.chunk_rows * layout.slots,), np.int32)
    segments = plan.workload.batch.items.segments
    lengths, chunks = item_lengths(segments), float(segments.any(axis=(1, 2)).sum())
    features = plan.batch.image_features
    yield RunProgram(
      name,
      lambda: self._encoder.store_program.lower(
        rows, plan.state.params, plan.frozen, plan.chunk, features, ids, normalized=normalized
      ),
      held + bytes_a_chip((rows, plan.chunk, ids)),
      times * number * chunks / len(lengths),
      # A chunk is assumed to hold as many items and tokens as an average chunk of the batch.
      Work(len(lengths) / chunks, float(lengths.sum()) / chunks, lengths, trains=False),
      key=("encode",),  # What normalization adds is little.
      rows=bytes_a_chip(rows),
    )

  def kmeans(
    self, name: str, rows: jax.ShapeDtypeStruct, clusters: int, number: int, held: float, runs: int
  ) -> RunProgram:
    """Returns the program that splits rows into clusters; where `tensor` also shares rows, they are copied."""
    return RunProgram(
      name, lambda: lower_kmeans(rows, clusters, number, self._mesh), held + self._copy_for_all(rows), runs
    )

  def means(
    self,
    name: str,
    rows: jax.ShapeDtypeStruct,
    count: int,
    held: float,
    *,
    num_rows: int | None = None,
    pairs: int | None = None,
    normalized: bool = False,
    times: int = 1,
  ) -> Iterator[RunProgram]:
    """Yields the programs that compute `count` means of rows.

    Args:
      name: What is computed.
      rows: Embeddings.
      count: Number of means.
      held: Bytes that a chip holds, the embeddings included.
      num_rows: Number of rows of the result; the default is `count` rounded up.
      pairs: Number of pairs of a row and a mean; the default is that of queries and labels.
      normalized: Whether rows are normalized first.
      times: How often the means are computed.
    """
    num_rows = sharding.padded_rows(count) if num_rows is None else num_rows
    pairs = round(self._size.train * self._size.labels_per_query) if pairs is None else pairs
    devices, dim, tensor = self._mesh.size, rows.shape[1], self._plan.mesh_plan.tensor
    per_device = math.ceil(num_rows / devices)
    blocks = math.ceil(per_device / max(1, LABEL_BLOCK // devices))
    slots = devices * math.ceil(per_device / blocks)
    means, sums = 4 * per_device * dim, 4 * slots * dim
    held += self._copy_for_all(rows)
    programs = mean_programs(rows, count, num_rows, self._mesh, normalized)
    pair_blocks = blocks * math.ceil(pairs / blocks / devices / PAIR_BLOCK)
    runs = {"largest value": 1, "sums": pair_blocks, "means": blocks}
    for part, lower in programs.items():
      if part == "largest value" and normalized:  # Its result is known.
        continue
      extra = 0.0 if part == "largest value" else means + sums + 8.0 * slots + 8.0 * PAIR_BLOCK * (part == "sums")
      if part == "means" and tensor > 1:  # The result is then copied, from shares over all axes to shares of rows.
        extra += tensor * means
      # The type of the embeddings matters to all programs but the last, which does not read them.
      key = ("means", part, count, num_rows, normalized, rows.shape, rows.dtype if part != "means" else None)
      yield RunProgram(f"{name}: {part}", lower, held + extra, times * runs[part], key=key)

  def prototypes(self, name: str, held: float) -> RunProgram:
    """Returns the program that replaces the pooled outputs of a block of labels by prototypes."""
    state, rows = self._plan.state, self.labels
    start = jax.ShapeDtypeStruct((), np.int32)
    block = self._encoder.prototype_block(rows.shape[0])
    return RunProgram(
      name,
      lambda: self._encoder.prototype_rows_program.lower(
        rows, state.params, self._plan.frozen, state.label_clusters, state.centroids, start
      ),
      held,
      rows.shape[0] // sharding.row_devices(self._mesh) // block,
      key=("prototypes",),
    )

  def _copy_for_all(self, rows: jax.ShapeDtypeStruct) -> float:
    """Returns the bytes of the copy of rows that is split over all axes of the mesh; 0 where the rows are already."""
    tensor = self._plan.mesh_plan.tensor
    return 0.0 if tensor == 1 else bytes_a_chip(rows) / tensor
