"""Predicts the labels of a file of queries block by block; a run that was killed resumes after its last block.

The file may be larger than memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import json
import logging
import os
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import (
  locked,
  new_file,
  read_json_object,
  remove_folder,
  sha256_of_file,
  sync_file,
  sync_folder,
  write_json,
  writing,
)
from vixml_jax.inference.block_timings import BlockTimings
from vixml_jax.inference.predictor import Predictor, UnreadableImage
from vixml_jax.inference.queries import Query
from vixml_jax.inference.query_files import QueryFile
from vixml_jax.inference.result_files import ResultFormat, result_format
from vixml_jax.manifest import describe_file, find_damage, read_hashes, write_hashes
from vixml_jax.prefetch import prefetched
from vixml_jax.ragged import Ragged
from vixml_jax.stages import stage

_FORMAT = 1
_JOB = "job.json"

_log = logging.getLogger(__name__)


def prepare_output(output: Path, queries: Path) -> None:
  """Checks before any work that the output can be written.

  Raises:
    InputError: The suffix is not one of `result_format`, the folder does not exist or cannot be written to, or the
      output is the file of queries.
  """
  result_format(output)
  if output.is_dir():
    raise InputError(f"{output}: is a folder; set --output to a file")
  if output.exists() and queries.exists() and output.samefile(queries):
    raise InputError(f"{output}: is the file of queries; use another --output")
  if not output.parent.is_dir():
    raise InputError(f"{output.parent}: no such folder; create it or use another --output")
  if not os.access(output.parent, os.W_OK):
    raise InputError(f"{output.parent}: cannot be written to; use another --output")


def predict_file(
  predictor: Predictor, queries: QueryFile, path: Path, output: Path, *, k: int, batch_size: int
) -> dict[str, Any]:
  """Writes the predictions for a file of queries, statistics, and a list of images that could not be read.

  Finished blocks are kept in `OUTPUT.partial/`, with the size and sha256 of their files. A run that was killed and is
  started again uses those that are whole and writes the same bytes as a run that was not killed: blocks are cut at
  fixed rows, and each is encoded and searched by itself. The output appears whole or not at all.

  Args:
    predictor: The model and its index.
    queries: The file of queries, opened.
    path: Path of the file of queries.
    output: File to write, see `result_format`. `OUTPUT.stats.json` is written next to it. If an image could not be
      read, `OUTPUT.bad_images.jsonl` has a line with row, image and reason for it; its query is encoded without it.
    k: Number of labels for each query; more than there are labels gives all of them.
    batch_size: Number of queries in a block.

  Returns:
    The statistics: number of queries, and for encoding and for searching what `BlockTimings.summary` returns.

  Raises:
    InputError: The file of queries has an error, the folder was started with another file or other settings, or the
      disk is full.
  """
  k = predictor.capped_k(k)
  count = queries.check(_FilterChecker(predictor))
  partial = output.with_name(f"{output.name}.partial")
  with locked(partial / "lock"):
    job = _Job(predictor, partial, result_format(output), k, batch_size)
    job.start_or_resume(
      {"queries_sha256": sha256_of_file(path), "k": k, "batch_size": batch_size, "output": output.suffix}
      | predictor.settings()
    )
    numbers = range(-(-count // batch_size))
    numbered = zip(numbers, queries.blocks(batch_size), strict=True)
    with (
      stage("predict", total=count, unit="query", done=job.resumed(count), logged=False) as progress,
      ThreadPoolExecutor(1, "write") as writer,
      contextlib.closing(prefetched(job.prepared(numbered), "read")) as blocks,
    ):
      written = _done()
      for block in blocks:
        found = job.answer(block)
        written.result()  # One block at a time is written while the next one is encoded.
        written = writer.submit(job.write, block, found)
        progress.advance(len(block.queries))
      written.result()
    statistics = job.statistics(count)
    job.publish(numbers, output, statistics)
  return statistics


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


class _TokenizedBlock(NamedTuple):
  """Consecutive queries, with the number of their block and the token ids of their texts."""

  number: int
  queries: Sequence[Query]
  tokens: Ragged


class _Found(NamedTuple):
  """Results of a block: scores and ids [Q, K], and images that could not be read."""

  scores: np.ndarray
  ids: np.ndarray
  bad: list[UnreadableImage]


def _done() -> Future[None]:
  future: Future[None] = Future()
  future.set_result(None)
  return future


class _Job:
  """The blocks of one file of queries; a folder holds the finished ones."""

  def __init__(self, predictor: Predictor, folder: Path, form: ResultFormat, k: int, batch_size: int):
    self._predictor, self._folder, self._form = predictor, folder, form
    self._k, self._batch_size = k, batch_size
    self._encoding, self._searching = BlockTimings(), BlockTimings()
    self._finished: set[int] = set()

  def start_or_resume(self, settings: dict[str, Any]) -> None:
    """Starts the folder, or resumes it if the file of queries and the settings are the same."""
    path, settings = self._folder / _JOB, {"format": _FORMAT} | settings
    if not path.exists() or not any(self._folder.glob("done-*")):
      write_json(path, settings)
      return
    again = "delete its folder to start again"
    former = read_json_object(path, absent=again, damaged=again)
    other = sorted(key for key in former.keys() | settings.keys() if former.get(key) != settings.get(key))
    if other:
      raise InputError(
        f"{self._folder}: was started with another {', '.join(other)}; use the former value, or delete this folder to "
        "start again"
      )

  def resumed(self, count: int) -> int:
    """Returns how many of `count` queries have been answered by earlier runs, and stores it for the statistics."""
    starts = range(0, count, self._batch_size)
    self._finished = {number for number in range(len(starts)) if self._is_finished(number)}
    self._resumed = sum(min(self._batch_size, count - starts[number]) for number in self._finished)
    return self._resumed

  def _is_finished(self, number: int) -> bool:
    """Returns whether the files of a block are those that were recorded when they were on the disk."""
    if not self._record(number).exists():
      return False
    try:
      files = read_hashes(self._record(number))
    except InputError as error:
      _log.warning("%s; its queries are answered again", error)
      return False
    damage = find_damage(self._folder, files, contents=True)
    if damage:
      _log.warning("%s: %s, so its queries are answered again", self._folder / damage.name, damage.reason)
    return damage is None

  def prepared(self, blocks: Iterable[tuple[int, Sequence[Query]]]) -> Iterator[_TokenizedBlock]:
    """Yields blocks that are not finished, tokenized."""
    for number, queries in blocks:
      if number not in self._finished:
        yield _TokenizedBlock(number, queries, self._predictor.encoder.tokenizer([query.text for query in queries]))

  def answer(self, block: _TokenizedBlock) -> _Found:
    """Encodes and searches a block."""
    bad: list[UnreadableImage] = []
    started = time.perf_counter()
    embeddings = self._predictor.encode(block.queries, tokens=block.tokens, unreadable=bad, whole_chunks=True)
    self._encoding.add(started, len(block.queries))
    started = time.perf_counter()
    texts = [query.text for query in block.queries]
    scores, ids = self._predictor.search(embeddings, self._k, self._predictor.filters(block.queries), texts=texts)
    self._searching.add(started, len(block.queries))
    return _Found(scores, ids, bad)

  def write(self, block: _TokenizedBlock, found: _Found) -> None:
    """Writes the predictions for a block, and their sizes and hashes after they have reached the disk."""
    first_row, part, bad = block.number * self._batch_size, self._part(block.number), self._bad(block.number)
    columns = self._predictor.columns(found.scores, found.ids)
    with writing(part):
      bad.unlink(missing_ok=True)
      if found.bad:
        _write_bad(bad, first_row, found.bad)
      self._form.write(part, first_row, [query.uid for query in block.queries], columns)
      files = {path.name: describe_file(path) for path in (part, bad) if path.exists()}
      write_hashes(self._record(block.number), files)  # The folder is synced with it.

  def statistics(self, count: int) -> dict[str, Any]:
    """Returns the statistics that `predict_file` describes."""
    return {
      "queries": count,
      "queries_of_earlier_runs": self._resumed,
      "batch_size": self._batch_size,
      "k": self._k,
      "devices": f"{self._predictor.mesh.size} x {jax.devices()[0].device_kind}",
      "encode": self._encoding.summary(),
      "search": self._searching.summary(),
    }

  def publish(self, numbers: range, output: Path, statistics: dict[str, Any]) -> None:
    """Joins the parts, moves all files into place, and removes the folder."""
    whole, listed = self._folder / "whole", output.with_name(f"{output.name}.bad_images.jsonl")
    with writing(output):
      self._form.join(map(self._part, numbers), whole)
      sync_file(whole)
      listed.unlink(missing_ok=True)
      bad = [path for path in map(self._bad, numbers) if path.exists()]
      if bad:
        lines = b"".join(path.read_bytes() for path in bad)
        with new_file(listed) as work:
          work.write_bytes(lines)
        _log.warning("%d images could not be read and were left out; %s lists them", lines.count(b"\n"), listed)
      write_json(output.with_name(f"{output.name}.stats.json"), statistics)
      whole.replace(output)
      sync_folder(output.parent)
    remove_folder(self._folder)

  def _part(self, number: int) -> Path:
    return self._folder / f"part-{number:08d}"

  def _record(self, number: int) -> Path:
    """Returns the file with size and sha256 of the files of a finished block."""
    return self._folder / f"done-{number:08d}"

  def _bad(self, number: int) -> Path:
    return self._folder / f"bad-{number:08d}"


def _write_bad(path: Path, first_row: int, bad: Sequence[UnreadableImage]) -> None:
  with path.open("w", encoding="utf-8") as file:
    for image in bad:
      record = {"row": first_row + image.query, "image": image.image, "reason": image.reason}
      file.write(json.dumps(record) + "\n")
