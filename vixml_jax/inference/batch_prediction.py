"""Predicts the labels of a file of queries block by block, in one process or several.

The file may be larger than memory. A run that was killed resumes after its last block.
"""

from pathlib import Path, PurePosixPath
import time
from typing import Any

import jax

from vixml_jax.errors import InputError
from vixml_jax.inference.block_job import ResultFiles
from vixml_jax.inference.block_runner import BatchFile, BlockAnswer, TokenizedBlock, run_batch
from vixml_jax.inference.block_timings import BlockTimings
from vixml_jax.inference.part_store import check_writable
from vixml_jax.inference.predictor import Predictor
from vixml_jax.inference.queries import Query
from vixml_jax.inference.query_images import UnreadableImage
from vixml_jax.inference.result_files import ResultFormat, result_format


def result_path(output: str, *, keep_parts: bool = False) -> str:
  """Returns the path or URL of the result: the output, or the folder of its parts.

  >>> result_path("gs://bucket/top.parquet", keep_parts=True)
  'gs://bucket/top'
  """
  return output.removesuffix(PurePosixPath(output).suffix) if keep_parts else output


def prepare_output(output: str, queries: Path, *, keep_parts: bool = False) -> None:
  """Checks before any work that the output can be written.

  Raises:
    InputError: The suffix is not one of `result_format`, the folder does not exist or cannot be written to, or the
      output is the file of queries.
  """
  path = Path(output)
  result_format(path)
  if path.is_dir():
    raise InputError(f"{output}: is a folder; set --output to a file")
  if path.exists() and queries.exists() and path.samefile(queries):
    raise InputError(f"{output}: is the file of queries; use another --output")
  check_writable(output)


def predict_file(
  predictor: Predictor, batch: BatchFile, output: str, *, k: int, keep_parts: bool = False
) -> dict[str, Any]:
  """Writes the predictions for a file of queries, statistics, and a list of images that could not be read.

  Finished blocks are kept in `OUTPUT.partial/`, with the size and sha256 of their files. A run that was killed and is
  started again, in any number of processes, uses those that are whole and writes the same bytes as a run that was not
  killed: blocks are cut at fixed rows, and each is encoded and searched by itself. The output appears whole or not at
  all.

  Args:
    predictor: The model and its index.
    batch: The file of queries.
    output: Path or URL of the file to write, see `result_format`. `OUTPUT.stats.json` is written next to it. If an
      image could not be read, `OUTPUT.bad_images.jsonl` has a line with row, image and reason for it; its query is
      encoded without it.
    k: Number of labels for each query; more than there are labels gives all of them.
    keep_parts: Whether to leave a file for each block, in the folder `result_path`, instead of one file.

  Returns:
    The statistics: number of queries, and for encoding and for searching what `BlockTimings.summary` returns, of this
    process. They have the key `files` if the output is complete, and lack it if other processes have blocks to do.

  Raises:
    InputError: The file of queries has an error, the folder was started with another file or other settings, or the
      disk is full.
  """
  k = predictor.capped_k(k)
  path, result = PurePosixPath(output), result_path(output, keep_parts=keep_parts)
  form = result_format(Path(output))
  files = ResultFiles(PurePosixPath(result).name, f"{path.stem}.", path.suffix, None if keep_parts else form.join)
  settings = {"k": k, "output": path.suffix, "keep_parts": keep_parts} | predictor.settings()
  return run_batch(_Prediction(predictor, form, k), batch, result, files, settings, _FilterChecker(predictor))


class _FilterChecker:
  """Checks that the index knows the names in the filters of queries; each name is looked up once."""

  def __init__(self, predictor: Predictor):
    self._index = predictor.index
    self._labels: set[str] = set()
    self._categories: set[str] = set()

  def __call__(self, query: Query) -> None:
    if query.allow is None and query.categories is None and not query.deny:
      return
    labels = {*(query.allow or ()), *query.deny} - self._labels
    categories = {*(query.categories or ())} - self._categories
    try:
      if labels:
        self._index.filters(deny=[sorted(labels)])
      if categories:
        self._index.filters(categories=[sorted(categories)])
    except InputError as error:
      raise InputError(f"{query.where}: {error}") from error
    self._labels |= labels
    self._categories |= categories


class _Prediction:
  """Encodes and searches blocks."""

  name = "predict"

  def __init__(self, predictor: Predictor, form: ResultFormat, k: int):
    self.tokenizer = predictor.encoder.tokenizer
    self._predictor, self._form, self._k = predictor, form, k
    self._encoding, self._searching = BlockTimings(), BlockTimings()

  def answer(self, block: TokenizedBlock) -> BlockAnswer:
    """Returns scores and ids [Q, K]."""
    bad: list[UnreadableImage] = []
    started = time.perf_counter()
    embeddings = self._predictor.encode(block.queries, tokens=block.tokens, unreadable=bad, whole_chunks=True)
    self._encoding.add(started, len(block.queries))
    started = time.perf_counter()
    texts = [query.text for query in block.queries]
    found = self._predictor.search(embeddings, self._k, self._predictor.filters(block.queries), texts=texts)
    self._searching.add(started, len(block.queries))
    return BlockAnswer(found, bad)

  def write(self, path: Path, first_row: int, block: TokenizedBlock, answer: BlockAnswer) -> None:
    """Writes a part in the format of the output."""
    columns = self._predictor.columns(*answer.arrays)
    self._form.write(path, first_row, [query.uid for query in block.queries], columns)

  def statistics(self) -> dict[str, Any]:
    """Returns what `predict_file` describes."""
    return {
      "k": self._k,
      "devices": f"{self._predictor.mesh.size} x {jax.devices()[0].device_kind}",
      "encode": self._encoding.summary(),
      "search": self._searching.summary(),
    }
