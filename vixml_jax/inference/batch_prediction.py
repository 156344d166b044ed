"""Answers a file of queries that may be larger than memory, block by block; a killed run goes on where it was."""

from collections.abc import Sequence
import dataclasses
import json
import logging
import os
from pathlib import Path
import shutil
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from vixml_jax.errors import InputError
from vixml_jax.files import locked, sha256_of_file, write_json
from vixml_jax.inference.predictor import Predictor, UnreadableImage
from vixml_jax.inference.queries import Query
from vixml_jax.inference.query_files import QueryFile
from vixml_jax.inference.result_files import ResultFormat, result_format

_FORMAT = 1
_JOB = "job.json"

_log = logging.getLogger(__name__)


def prepare_output(output: Path, queries: Path) -> None:
  """Refuses, before any time is spent, an output that could not be written.

  Raises:
    InputError: another ending than those of `result_format`, a folder that is not there or not writable, or the
      file of queries itself.
  """
  result_format(output)
  if output.is_dir():
    raise InputError(f"{output}: is a folder; --output must name a file")
  if output.exists() and queries.exists() and output.samefile(queries):
    raise InputError(f"{output}: holds the queries; name another --output")
  if not output.parent.is_dir():
    raise InputError(f"{output.parent}: no such folder; make it, or name another --output")
  if not os.access(output.parent, os.W_OK):
    raise InputError(f"{output.parent}: cannot be written to; name another --output")


def answer_file(
  predictor: Predictor, queries: QueryFile, path: Path, output: Path, *, k: int, batch_size: int
) -> dict[str, Any]:
  """Writes the answers to a file of queries, their statistics, and a list of pictures that could not be read.

  Finished blocks are kept in `OUTPUT.partial/`. A run that was killed and is started again takes them up and ends with
  the same file to the bit: blocks are cut at fixed rows, and each is encoded and searched by itself. The output
  appears whole or not at all.

  Args:
    predictor: what answers.
    queries: the file, opened.
    path: of it.
    output: see `result_format`. Beside it come `OUTPUT.stats.json` and, where there are any, `OUTPUT.bad_images.jsonl`
      with row, image and reason, a line each: such a query is answered by what else it has.
    k: labels a query.
    batch_size: queries a block.

  Returns:
    What the statistics hold: queries, and of encoding and searching apart p50 and p99 of the milliseconds a block
    takes, and queries a second. They are measured on the blocks of this process, but for its first, which compiles.

  Raises:
    InputError: something is wrong with the file, or the folder was begun with another file or other settings.
  """
  predictor.check_k(k)
  count = queries.check(_FilterNames(predictor))
  partial = output.with_name(f"{output.name}.partial")
  with locked(partial / "lock"):
    job = _Job(predictor, partial, result_format(output), k, batch_size)
    job.take_up(
      {"queries_sha256": sha256_of_file(path), "k": k, "batch_size": batch_size, "output": output.suffix}
      | predictor.settings()
    )
    numbers = range(-(-count // batch_size))
    with tqdm(total=count, desc="predict", unit="query", disable=None) as progress:
      for number, block in zip(numbers, queries.blocks(batch_size), strict=True):
        job.do(number, block)
        progress.update(len(block))
    statistics = job.statistics(count)
    job.publish(numbers, output, statistics)
  return statistics


class _FilterNames:
  """Refuses a query whose filters name what the index does not know; each name is looked up once."""

  def __init__(self, predictor: Predictor):
    self._index = predictor.index
    self._labels: set[str] = set()
    self._categories: set[str] = set()

  def __call__(self, query: Query) -> None:
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


@dataclasses.dataclass
class _Timings:
  """Seconds that each block took, and its queries."""

  seconds: list[float] = dataclasses.field(default_factory=list)
  queries: list[int] = dataclasses.field(default_factory=list)

  def add(self, started: float, queries: int) -> None:
    self.seconds.append(time.perf_counter() - started)
    self.queries.append(queries)

  def summary(self) -> dict[str, float] | None:
    """Without the first block, unless it is the only one; None where all had been done before."""
    first = 1 if len(self.seconds) > 1 else 0
    if not self.seconds:
      return None
    milliseconds = 1000 * np.array(self.seconds[first:])
    return {
      "p50_ms": float(np.percentile(milliseconds, 50)),
      "p99_ms": float(np.percentile(milliseconds, 99)),
      "queries_per_second": 1000 * sum(self.queries[first:]) / float(milliseconds.sum()),
    }


class _Job:
  """The blocks of one file: those that are finished lie in a folder."""

  def __init__(self, predictor: Predictor, folder: Path, form: ResultFormat, k: int, batch_size: int):
    self._predictor, self._folder, self._form = predictor, folder, form
    self._k, self._batch_size = k, batch_size
    self._encoding, self._searching = _Timings(), _Timings()
    self._resumed = 0

  def take_up(self, settings: dict[str, Any]) -> None:
    """Begins the folder, or goes on with one of the same file and settings."""
    path, settings = self._folder / _JOB, {"format": _FORMAT} | settings
    begun = _read_json(path)
    if begun is None or not any(self._folder.glob("part-*")):
      write_json(path, settings)
      return
    other = sorted(key for key in begun.keys() | settings.keys() if begun.get(key) != settings.get(key))
    if other:
      raise InputError(
        f"{self._folder}: was begun with another {', '.join(other)}; give the former, or delete this "
        "folder to begin anew"
      )

  def do(self, number: int, block: Sequence[Query]) -> None:
    """Answers a block unless that was done; the file of its answers is the last to appear."""
    target = self._part(number)
    if target.exists():
      self._resumed += len(block)
      return
    first_row = number * self._batch_size
    bad: list[UnreadableImage] = []
    started = time.perf_counter()
    embeddings = self._predictor.encode(block, unreadable=bad, whole_chunks=True)
    self._encoding.add(started, len(block))
    started = time.perf_counter()
    found = self._predictor.search(embeddings, self._k, block)
    self._searching.add(started, len(block))
    if bad:
      _write_bad(self._bad(number), first_row, bad)
    work = self._folder / "incomplete"
    self._form.write(work, first_row, block, self._predictor.named(*found))
    os.replace(work, target)

  def statistics(self, count: int) -> dict[str, Any]:
    """See `answer_file`."""
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
    """Joins the parts, puts all into place, and removes the folder."""
    whole = self._folder / "whole"
    self._form.join(map(self._part, numbers), whole)
    bad = [path for path in map(self._bad, numbers) if path.exists()]
    listed = output.with_name(f"{output.name}.bad_images.jsonl")
    listed.unlink(missing_ok=True)
    if bad:
      lines = b"".join(path.read_bytes() for path in bad)
      (self._folder / "bad").write_bytes(lines)
      os.replace(self._folder / "bad", listed)
      _log.warning("%d pictures could not be read and were left out; %s lists them", lines.count(b"\n"), listed)
    write_json(output.with_name(f"{output.name}.stats.json"), statistics)
    os.replace(whole, output)
    shutil.rmtree(self._folder)

  def _part(self, number: int) -> Path:
    return self._folder / f"part-{number:08d}"

  def _bad(self, number: int) -> Path:
    return self._folder / f"bad-{number:08d}"


def _read_json(path: Path) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: damaged ({error}); delete its folder to begin anew") from error


def _write_bad(path: Path, first_row: int, bad: Sequence[UnreadableImage]) -> None:
  with path.open("w", encoding="utf-8") as file:
    for picture in bad:
      record = {"row": first_row + picture.query, "image": picture.image, "reason": picture.reason}
      file.write(json.dumps(record) + "\n")
