"""A model and its label index, warmed up: answers batches, and takes over new snapshots of the index meanwhile."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import io
import logging
import threading
import time
from typing import Any

import numpy as np
from PIL import Image

from vixml_jax.errors import InputError
from vixml_jax.inference.predictor import Prediction, Predictor, UnreadableImage
from vixml_jax.inference.queries import Query
from vixml_jax.search import snapshots
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.served_index import ServedIndex

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class QueryRequest:
  """A query and how many labels it wants."""

  query: Query
  k: int


@dataclasses.dataclass(frozen=True)
class Model:
  """What answers; it is replaced as a whole.

  Attributes:
    predictor: searches in `index`.
    index: the label index.
    snapshot: what CURRENT of the index says.
    reads_pictures: whether there is a tower for pictures.
  """

  predictor: Predictor
  index: ServedIndex
  snapshot: str
  reads_pictures: bool


class Engine:
  """Loads a predictor, compiles all its programs, and answers.

  Args:
    load: makes the predictor.
    limits: batches and labels a query are no larger.
    metrics: takes times and sizes.

  Attributes:
    model: None until all programs are compiled.
  """

  def __init__(self, load: Callable[[], Predictor], limits: Limits, metrics: Metrics):
    self.model: Model | None = None
    self._load, self._limits, self._metrics = load, limits, metrics
    # Two threads that start programs of several devices can make them wait for each other for ever.
    self._devices: contextlib.AbstractContextManager = contextlib.nullcontext()

  def start(self) -> None:
    """Loads and warms up.

    Raises:
      InputError: something of the workdir is missing or damaged.
    """
    started = time.monotonic()
    predictor = self._load()
    if predictor.mesh.size > 1:
      self._devices = threading.Lock()
    reads_pictures = self._warm_up_tower(predictor)
    for program in _encoders(predictor, self._limits.batch):
      program()
    index, snapshot = self._open_index(predictor)
    self.model = Model(dataclasses.replace(predictor, index=index), index, snapshot, reads_pictures)
    _log.info(
      "ready after %.1f s: %d labels, step %d",
      time.monotonic() - started,
      index.num_live,
      predictor.encoder.checkpoint["step"],
    )

  def answer(self, asked: Sequence[QueryRequest]) -> list[list[Prediction] | Exception]:
    """Labels for each query of a batch; `RequestError` for one whose pictures cannot be read."""
    model = self.model
    assert model is not None  # Nothing is asked before.
    predictor, bad = model.predictor, list[UnreadableImage]()
    queries = [each.query for each in asked]
    self._metrics.batch_queries.observe(len(queries))
    with self._devices:
      with self._metrics.encode_seconds.time():
        embeddings = predictor.encode(queries, unreadable=bad)
      with self._metrics.search_seconds.time():
        found = predictor.named(*predictor.search(embeddings, max(each.k for each in asked), queries))
    answers: list[list[Prediction] | Exception] = [labels[: each.k] for labels, each in zip(found, asked, strict=True)]
    for picture in reversed(bad):  # Of several bad pictures of a query the first is named.
      answers[picture.query] = RequestError(
        422, picture.reason, f"{queries[picture.query].where}.images[{picture.image}]"
      )
    return answers

  def reload_index(self) -> bool:
    """Takes over the index's valid snapshot if it is another one than that in use.

    Requests are answered from the former one until the new one is warmed up. One that cannot be used is logged, and
    the former stays.

    Returns:
      whether it was taken over.
    """
    model = self.model
    if model is None or _snapshot(model.index) == model.snapshot:
      return False
    try:
      index, snapshot = self._open_index(model.predictor)
    except Exception as error:  # Whatever it is, the former one still answers.
      self._metrics.reloads.labels("failed").inc()
      _log.warning("the new label index is not used: %s", error, exc_info=not isinstance(error, InputError))
      self.model = dataclasses.replace(model, snapshot=_snapshot(model.index))  # It is not tried again.
      return False
    self.model = Model(dataclasses.replace(model.predictor, index=index), index, snapshot, model.reads_pictures)
    self._metrics.reloads.labels("done").inc()
    _log.info("new label index: %d labels", index.num_live)
    return True

  def _open_index(self, predictor: Predictor) -> tuple[ServedIndex, str]:
    """The valid snapshot, warmed up, and what CURRENT said before it was opened."""
    former, limits = predictor.index, self._limits
    snapshot = _snapshot(former)
    index = ServedIndex.open(
      former.folder, checkpoint=predictor.encoder.checkpoint, search=former.search_kind, mesh=predictor.mesh
    )
    hits = None if predictor.retrieval is None else predictor.retrieval.hits
    for program in index.warm_up(max(limits.k, hits or 0) + limits.names, limits.batch, hits):
      with self._devices:
        program()
    self._metrics.labels.set(index.num_live)
    return index, snapshot

  def _warm_up_tower(self, predictor: Predictor) -> bool:
    if predictor.pictures is None:
      return False
    try:
      predictor.pictures([_black()])
    except InputError as error:
      _log.warning("pictures are refused, feature vectors are not: %s", error)
      return False
    return True


def _encoders(predictor: Predictor, most: int) -> Iterator[Callable[[], Any]]:
  """What compiles every program that encodes up to `most` queries.

  They differ in the number of packed rows, a power of two, and the longest queries need the most rows: twice as many
  queries need no more than twice the rows, so none is left out.
  """
  encoder = predictor.encoder
  vector = np.zeros(encoder.feature_dim, np.float16)
  longest = Query("a " * encoder.config.dataset.max_length, (vector,) * encoder.images)
  counts = [1]
  while counts[-1] < most:
    counts.append(min(2 * counts[-1], most))
  for count in counts:
    yield functools.partial(predictor.encode, [longest] * count)


def _snapshot(index: Any) -> str:
  try:
    return (index.folder / snapshots.CURRENT).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError):
    return ""  # Whoever opens it says what is wrong.


def _black() -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (1, 1)).save(buffer, "PNG")
  return buffer.getvalue()
