"""Runs a batch job: reads, tokenizes, answers and writes the blocks of a file of queries that this process has to do.

While a block is answered on the devices, one thread reads and tokenizes the next one, and another writes the last one.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file
from vixml_jax.inference.block_job import BlockJob, ResultFiles
from vixml_jax.inference.bucket_store import open_store
from vixml_jax.inference.part_store import job_key
from vixml_jax.inference.queries import Query
from vixml_jax.inference.query_files import QueryFile
from vixml_jax.inference.query_images import UnreadableImage
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.prefetch import prefetched
from vixml_jax.process_share import ProcessShare
from vixml_jax.ragged import Ragged
from vixml_jax.stages import Stage, stage

_log = logging.getLogger(__name__)


class TokenizedBlock(NamedTuple):
  """Consecutive queries, with the number of their block and the token ids of their texts."""

  number: int
  queries: Sequence[Query]
  tokens: Ragged


class BlockAnswer(NamedTuple):
  """What was computed for a block: arrays with a row for each query, and images that could not be read."""

  arrays: tuple[np.ndarray, ...]
  bad: list[UnreadableImage]


class BatchFile(NamedTuple):
  """A file of queries and how it is divided.

  Attributes:
    queries: The file, opened.
    path: Its path.
    size: Number of queries in a block.
    share: Share of this process.
  """

  queries: QueryFile
  path: Path
  size: int
  share: ProcessShare = ProcessShare()


class BlockWork(Protocol):
  """What is done with each block.

  Attributes:
    name: Name of the work in the progress bar.
    tokenizer: Tokenizer of the texts of queries.
  """

  name: str
  tokenizer: Tokenizer

  def answer(self, block: TokenizedBlock) -> BlockAnswer:
    """Computes the answer to a block, on the devices."""

  def write(self, path: Path, first_row: int, block: TokenizedBlock, answer: BlockAnswer) -> None:
    """Writes the part of a block whose first query is row `first_row` of the file."""

  def statistics(self) -> dict[str, Any]:
    """Returns what was measured, as JSON."""


def run_batch(
  work: BlockWork,
  batch: BatchFile,
  output: str,
  files: ResultFiles,
  settings: dict[str, Any],
  check: Callable[[Query], None] = lambda query: None,
) -> dict[str, Any]:
  """Does the blocks of this process, and publishes the result if no other process has blocks to do.

  Args:
    work: What is done with each block.
    batch: The file of queries.
    output: File or folder of the result: a path, or the URL of a bucket.
    files: Names of its files.
    settings: Whatever determines the result besides the file of queries, as JSON.
    check: Checks a query before any work.

  Returns:
    Statistics. They have the key `files`, with size and sha256 of each file of the result, if it was published.

  Raises:
    InputError: The file of queries has an error, blocks of another job are in the way, or the disk is full.
  """
  settings = {"queries_sha256": sha256_of_file(batch.path), "batch_size": batch.size} | settings
  store = open_store(output, job_key(settings))
  job, share, size = BlockJob(store, settings, files, batch.share), batch.share, batch.size
  if (found := job.published()) is not None:
    _log.info("%s: is the result of this command already; nothing to do", output)
    store.remove()
    return found
  if files.join is None and store.has_result():
    raise InputError(f"{output}: exists, and is not the result of this command; remove it or use another --output")
  count = batch.queries.check(size, share.has, check)
  with job.started(-(-count // size)):
    missing = job.missing()
    own = _num_queries((number for number in range(job.count) if share.has(number)), count, size)
    to_do = _num_queries(missing, count, size)
    with stage(work.name, total=own, unit="query", done=own - to_do, logged=False) as progress:
      _run_blocks(work, job, batch, missing, progress)
    statistics = {
      "queries": count,
      "queries_of_this_process": own,
      "queries_of_earlier_runs": own - to_do,
      "processes": share.count,
      "batch_size": size,
    }
    return job.finish(statistics | work.statistics()) or statistics | work.statistics()


def _num_queries(blocks: Iterable[int], count: int, size: int) -> int:
  """Returns the number of queries in blocks of a file of `count` queries."""
  return sum(min(size, count - number * size) for number in blocks)


def _run_blocks(work: BlockWork, job: BlockJob, batch: BatchFile, missing: Collection[int], progress: Stage) -> None:
  blocks = batch.queries.blocks(batch.size, missing.__contains__) if missing else iter(())
  with (
    ThreadPoolExecutor(1, "write") as writer,
    contextlib.closing(prefetched(_tokenized(blocks, work.tokenizer), "read")) as prepared,
  ):
    written: Future[None] | None = None
    for block in prepared:
      answer = work.answer(block)
      if written is not None:
        written.result()  # One block at a time is written while the next one is answered.
      written = writer.submit(_write, work, job, block, answer, batch.size)
      progress.advance(len(block.queries))
    if written is not None:
      written.result()


def _tokenized(blocks: Iterable[tuple[int, list[Query]]], tokenizer: Tokenizer) -> Iterator[TokenizedBlock]:
  for number, queries in blocks:
    yield TokenizedBlock(number, queries, tokenizer([query.text for query in queries]))


def _write(work: BlockWork, job: BlockJob, block: TokenizedBlock, answer: BlockAnswer, batch_size: int) -> None:
  first_row = block.number * batch_size
  write_bad = (lambda path: _write_bad(path, first_row, answer.bad)) if answer.bad else None
  job.write(block.number, lambda path: work.write(path, first_row, block, answer), write_bad)


def _write_bad(path: Path, first_row: int, bad: Sequence[UnreadableImage]) -> None:
  with path.open("w", encoding="utf-8") as file:
    for image in bad:
      record = {"row": first_row + image.query, "image": image.image, "reason": image.reason}
      file.write(json.dumps(record) + "\n")
