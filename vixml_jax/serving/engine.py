"""A loaded and compiled model with its label index: answers batches of queries, and switches to new snapshots."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import io
import logging
import os
import threading
import time
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vixml_jax.errors import InputError
from vixml_jax.inference.blend_ranking import BlendRanking, Dials
from vixml_jax.inference.predictions import Prediction
from vixml_jax.inference.predictor import Predictor, UnreadableImage
from vixml_jax.inference.queries import Query, QueryFormat, query_format
from vixml_jax.ragged import Ragged
from vixml_jax.run.workdir import CHECKPOINTS
from vixml_jax.search import snapshots
from vixml_jax.search.filters import Filters
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.serving.explanations import Detail, Why, explain
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.rankings import Rankings
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.request_filters import join_filters
from vixml_jax.serving.request_record import BatchTimes
from vixml_jax.serving.served_index import ServedIndex
from vixml_jax.serving.suggestions import example_queries

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class QueryRequest:
  """A query of a request.

  Attributes:
    query: The query, without filters.
    tokens: Token ids of its text.
    k: Number of labels to find.
    filters: Filters of all queries of the request; None if it has none.
    row: Position of the query in the request.
    tail: The dial of the blend from frequent to rare labels; None for that of the server.
    min_probability: The least probability of a label; None for that of the server.
    ranking: How labels are ranked; None for the default of the server.
    embed: Whether to return the embedding instead of labels.
    explain: Whether to say why each label was found.
    pixels: Number of pixels to decode for its images; 0 if none is an encoded image.
  """

  query: Query
  tokens: np.ndarray
  k: int = 0
  filters: Filters | None = None
  row: int = 0
  tail: float | None = None
  min_probability: float | None = None
  ranking: str | None = None
  embed: bool = False
  explain: bool = False
  pixels: int = 0

  @property
  def size(self) -> int:
    """Number of tokens, of which each image is one."""
    return len(self.tokens) + len(self.query.images)


class Outcome(NamedTuple):
  """What a batch gives for one of its queries.

  Attributes:
    labels: Labels, best first; empty if only the embedding was asked for.
    embedding: float32 [D], of unit norm.
    times: Times of the batch.
    why: Why each label was found; None if that was not asked for.
  """

  labels: list[Prediction]
  embedding: np.ndarray
  times: BatchTimes
  why: list[Why] | None = None


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model that answers queries; it is replaced as a whole.

  Attributes:
    rankings: Predictors that search with `index`, by ranking.
    form: Form of queries that the model takes.
    index: Search of the label index.
    pointer: Content of the index's CURRENT when its last snapshot was opened, or could not be opened.
    reads_images: Whether the model has a tower for image files.
    examples: Queries to try.
    name: Name of the workdir.
    created: When its checkpoint was written, in seconds since 1970.
    detail: What explanations say of training queries.
  """

  rankings: Rankings
  form: QueryFormat
  index: ServedIndex
  pointer: str
  reads_images: bool
  examples: list[str]
  name: str
  created: int
  detail: Detail

  @property
  def explains(self) -> bool:
    """Whether answers can be explained: the server may, and training queries are at hand."""
    return self.detail != Detail.NONE and bool(self.rankings.hits[1])

  @property
  def predictor(self) -> Predictor:
    """Predictor of the default ranking."""
    return self.rankings.first

  @property
  def labels(self) -> LabelIndex:
    """The label index."""
    return self.index.labels


class Engine:
  """Loads a predictor, compiles all of its programs, and answers queries.

  Attributes:
    model: The model; None until all programs are compiled.
  """

  def __init__(self, load: Callable[[], Rankings], limits: Limits, metrics: Metrics, detail: Detail = Detail.TEXTS):
    """Does not load yet.

    Args:
      load: Function that loads a model with the rankings to offer.
      limits: Limits of batches and of the number of labels.
      metrics: Metrics to record times and sizes in.
      detail: What explanations say of training queries.
    """
    self.model: ServedModel | None = None
    self._load, self._limits, self._metrics, self._detail = load, limits, metrics, detail
    # Two threads that start programs of several devices can block each other forever.
    self._devices: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

  def start(self) -> None:
    """Loads the model and compiles its programs.

    Raises:
      InputError: A file of the workdir is missing or damaged.
    """
    started = time.monotonic()
    rankings = self._load()
    predictor, default = rankings.first, rankings.default
    if predictor.mesh.size > 1:
      self._devices = threading.Lock()
    reads_images = self._warm_up_tower(predictor)
    programs = list(predictor.encoder.warm_up(self._limits.batch))
    # Several threads compile, unless programs of several devices would have to wait for each other.
    threads = 1 if predictor.mesh.size > 1 else os.cpu_count() or 1
    self._compile(programs[:1])  # It makes what all of them share.
    self._compile(programs[1:], threads)
    self.model = self._serve(rankings, predictor.index, reads_images, threads)
    _log.info("rankings: %s; default %s: %s", ", ".join(rankings.predictors), default.name, default.reason)
    _log.info(
      "ready after %.1f s: %d labels, step %d",
      time.monotonic() - started,
      predictor.index.num_live,
      predictor.encoder.checkpoint["step"],
    )

  def answer(self, requests: Sequence[QueryRequest]) -> list[Outcome | Exception]:
    """Returns what each query of a batch gets; `RequestError` for a query with an image that cannot be read."""
    model = self.model
    assert model is not None  # Requests are refused until the model is there.
    bad = list[UnreadableImage]()
    queries = [request.query for request in requests]
    lengths = [len(request.tokens) for request in requests]
    tokens = Ragged.of_lengths(np.concatenate([request.tokens for request in requests]), lengths)
    self._metrics.batch_queries.observe(len(queries))
    started = time.perf_counter()
    with self._devices:
      embeddings = model.predictor.encode(queries, tokens=tokens, unreadable=bad)
      encoded = time.perf_counter()
      found = _ranked(model.rankings, requests, embeddings)
      whys = _explained(model, requests, embeddings, found) if any(request.explain for request in requests) else {}
    times = BatchTimes(started, encoded, time.perf_counter())
    self._metrics.encode_seconds.observe(times.encoded - times.started)
    self._metrics.search_seconds.observe(times.searched - times.encoded)
    answers: list[Outcome | Exception] = [
      Outcome(labels, embedding, times, whys.get(row))
      for row, (labels, embedding) in enumerate(zip(found, embeddings, strict=True))
    ]
    for image in reversed(bad):  # So that the first bad image of a query is named.
      answers[image.query] = RequestError(422, image.reason, f"{queries[image.query].where}.images[{image.image}]")
    return answers

  def reload_index(self) -> bool:
    """Switches to the current snapshot of the index if it is another one than that in use.

    The former snapshot answers requests until programs are compiled for the new one. A snapshot that cannot be used is
    logged, and the former one stays in use.

    Returns:
      Whether the snapshot was switched.
    """
    model = self.model
    if model is None:
      return False
    former, pointer = model.labels, snapshots.read_pointer(model.labels.folder)
    if pointer == model.pointer:
      return False
    try:
      labels = LabelIndex.open(
        former.folder,
        checkpoint=model.predictor.encoder.checkpoint,
        search=former.search_kind,
        mesh=model.predictor.mesh,
        form=former.form,
      )
      self.model = self._serve(model.rankings, labels, model.reads_images)
    except Exception as error:  # Whatever is wrong, the former snapshot still answers.
      self._metrics.reloads.labels("failed").inc()
      _log.warning("the new label index is not used: %s", error, exc_info=not isinstance(error, InputError))
      self.model = dataclasses.replace(model, pointer=pointer)  # The same snapshot is not tried again.
      return False
    self._metrics.reloads.labels("done").inc()
    _log.info("new label index: %d labels", labels.num_live)
    return True

  def _serve(self, rankings: Rankings, labels: LabelIndex, reads_images: bool, threads: int = 1) -> ServedModel:
    """Compiles the search of an opened index and returns the model that uses it."""
    index, limits = ServedIndex(labels), self._limits
    label_hits, query_hits = rankings.hits
    index.open_parts(query_hits)
    most = max(limits.k, label_hits) + limits.names
    programs = list(index.warm_up(most, limits.batch, query_hits))
    own = 1 + len(query_hits)
    self._compile(programs[:own])  # They make what all of them share, for queries and for labels.
    self._compile(programs[own:], threads)
    self._metrics.labels.set(labels.num_live)
    rankings = rankings.with_index(labels, index.search)
    encoder = rankings.first.encoder
    return ServedModel(
      rankings,
      query_format(encoder.config),
      index,
      labels.current,
      reads_images,
      example_queries(labels),
      encoder.workdir.resolve().name,
      int((encoder.workdir / CHECKPOINTS).stat().st_mtime),
      self._detail,
    )

  def _compile(self, programs: Iterable[Callable[[], object]], threads: int = 1) -> None:
    """Calls functions, which compile a program each, in some threads."""

    def call(program: Callable[[], object]) -> None:
      with self._devices:
        program()

    with ThreadPoolExecutor(threads, thread_name_prefix="compiler") as pool:
      for compiled in [pool.submit(call, program) for program in programs]:
        compiled.result()

  def _warm_up_tower(self, predictor: Predictor) -> bool:
    if predictor.image_encoder is None:
      return False
    try:
      predictor.image_encoder([_black()])
    except InputError as error:
      _log.warning("image files are refused, feature vectors are accepted: %s", error)
      return False
    return True


def _ranked(rankings: Rankings, requests: Sequence[QueryRequest], embeddings: np.ndarray) -> list[list[Prediction]]:
  """Returns the labels of each query, none if it asks for its embedding. Each ranking searches its queries together."""
  names = ["" if request.embed else request.ranking or rankings.default.name for request in requests]
  found: list[list[Prediction]] = [[] for _ in requests]
  for name in filter(None, dict.fromkeys(names)):
    rows = [row for row, own in enumerate(names) if own == name]
    some, predictor = [requests[row] for row in rows], rankings.predictors[name]
    scores, ids = predictor.search(
      embeddings if len(some) == len(requests) else embeddings[rows],
      max(request.k for request in some),
      join_filters([(request.filters, request.row) for request in some]),
      texts=[request.query.text for request in some],
      dials=_dials(predictor.blend, some),
    )
    for row, labels in zip(rows, predictor.named(scores, ids), strict=True):
      found[row] = labels[: requests[row].k]
  return found


def _explained(
  model: ServedModel, requests: Sequence[QueryRequest], embeddings: np.ndarray, found: Sequence[list[Prediction]]
) -> dict[int, list[Why]]:
  """Returns why each label was found, for the queries that ask for it, by their position in the batch."""
  rows = [row for row, request in enumerate(requests) if request.explain]
  texts = [requests[row].query.text for row in rows]
  hits = max(model.rankings.hits[1])  # A number that is compiled.
  labels = [found[row] for row in rows]
  whys = explain(model.labels, hits, texts, embeddings[rows], labels, model.detail == Detail.TEXTS)
  return dict(zip(rows, whys, strict=True))


def _dials(blend: BlendRanking | None, requests: Sequence[QueryRequest]) -> Dials | None:
  """Returns the settings of the blend for each request; None for another ranking."""
  if blend is None:
    return None
  settings = [
    (
      blend.tail if request.tail is None else request.tail,
      blend.min_probability if request.min_probability is None else request.min_probability,
    )
    for request in requests
  ]
  return Dials(*np.array(settings).T)


def _black() -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (1, 1)).save(buffer, "PNG")
  return buffer.getvalue()
