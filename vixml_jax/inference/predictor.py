"""Answers queries from a workdir: encodes them, searches the label index, and names what it found."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of
from vixml_jax.inference.queries import Query, QueryFormat
from vixml_jax.inference.query_images import QueryImageEncoder
from vixml_jax.inference.trained_encoder import TrainedEncoder, load_trained_encoder
from vixml_jax.run.workdir import INDEX
from vixml_jax.search import retrieval_augmented as retrieval
from vixml_jax.search.label_index import Filters, LabelIndex

GivenQuery = str | Mapping[str, Any] | Query


class Prediction(NamedTuple):
  """A label for a query.

  Attributes:
    label: the label's uid.
    id: its row in the index.
    text: its text.
    score: cosine of query and prototype; with retrieval augmentation a share of probability.
  """

  label: str
  id: int
  text: str
  score: float


class UnreadableImage(NamedTuple):
  """A picture that cannot be read: image `image` of query `query` of a call, from 0, and why."""

  query: int
  image: int
  reason: str


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """Settings of retrieval-augmented inference.

  Attributes:
    lambda_: weight of labels against training queries.
    temperature: of the softmax over both.
    hits: labels, and training queries, that are looked at.
  """

  lambda_: float
  temperature: float
  hits: int


@dataclasses.dataclass(frozen=True)
class Predictor:
  """What answers queries; `load` makes it.

  Attributes:
    encoder: embeds texts and images.
    index: of the labels.
    pictures: features of pictures; None for a model of texts only.
    retrieval: how training queries have a say; None for plain search.
  """

  encoder: TrainedEncoder
  index: LabelIndex
  pictures: QueryImageEncoder | None
  retrieval: Retrieval | None

  @property
  def mesh(self) -> Mesh:
    """The devices."""
    return self.encoder.mesh

  def predict(self, queries: Sequence[GivenQuery], k: int = 10) -> list[list[Prediction]]:
    """The k labels of highest score for each query.

    Example:
      predictor = vixml_jax.load("runs/quickstart")
      predictor.predict(["arrow up", {"title": "cloud", "images": ["cloud.png"], "deny": ["mdi/cloud"]}], k=5)

    Args:
      queries: each a text, or a dict with `title` and, where wanted, `content`, `images` (a list of paths, bytes,
        pictures of Pillow or feature vectors [F]), `allow` and `deny` (lists of uids of labels) and `categories`.
      k: how many, 1 to the number of labels.

    Returns:
      For each query its labels, best first; fewer than k where filters leave fewer, or, with retrieval augmentation,
      where fewer have a share.

    Raises:
      InputError: naming the query, by its place from 0, and what is wrong with it; or k.
    """
    checked = self.checked(queries)
    self.check_k(k)
    return self.named(*self.search(self.encode(checked), k, checked)) if checked else []

  def checked(self, queries: Sequence[GivenQuery]) -> list[Query]:
    """The queries of a call, checked.

    Raises:
      InputError: naming the query, by its place from 0.
    """
    if isinstance(queries, str | Mapping):
      raise InputError("queries: must be a list of queries; put a single one into brackets")
    wanted = query_format(self.encoder.config)
    return [query if isinstance(query, Query) else wanted.parse(query, f"query {i}") for i, query in enumerate(queries)]

  def check_k(self, k: int) -> None:
    """Refuses a k that the index cannot give.

    Raises:
      InputError: naming its bounds.
    """
    if not 1 <= k <= self.index.num_live:
      raise InputError(f"k={k}: must be 1 to {self.index.num_live}, the number of labels")

  def encode(
    self, queries: Sequence[GivenQuery], *, unreadable: list[UnreadableImage] | None = None, whole_chunks: bool = False
  ) -> np.ndarray:
    """Unit-norm embeddings, float32 [Q, D].

    Args:
      queries: as for `predict`.
      unreadable: takes the pictures that cannot be read, and that queries then go without; None refuses them.
      whole_chunks: see `TrainedEncoder.embed`.

    Raises:
      InputError: naming the query and what is wrong with it.
    """
    checked = self.checked(queries)
    vectors = self.image_vectors(checked, unreadable) if self.encoder.images else None
    return self.encoder.embed([query.text for query in checked], vectors, whole_chunks=whole_chunks)

  def search(self, embeddings: np.ndarray, k: int, queries: Sequence[Query] = ()) -> tuple[np.ndarray, np.ndarray]:
    """The best labels of embedded queries.

    Args:
      embeddings: [Q, D].
      k: how many.
      queries: the Q queries, for their filters; empty for none.

    Returns:
      scores float32 [Q, K], descending, and ids int32 [Q, K]; -inf and -1 where there are fewer.
    """
    filters = self._filters(queries)
    if self.retrieval is None:
      return self.index.search(embeddings, k, filters)
    return self._augmented(embeddings, k, filters)

  def named(self, scores: np.ndarray, ids: np.ndarray) -> list[list[Prediction]]:
    """Results of `search` with uids and texts, without the empty places."""
    distinct, places = np.unique(ids, return_inverse=True)
    real = distinct >= 0
    names = dict(
      enumerate(
        zip(self.index.uids(distinct[real]), distinct[real].tolist(), self.index.texts(distinct[real]), strict=True),
        int(np.sum(~real)),
      )
    )
    found: list[list[int]] = places.reshape(ids.shape).tolist()  # type: ignore[assignment]
    return [
      [Prediction(*names[place], score) for place, score in zip(row, of_row, strict=True) if place in names]
      for row, of_row in zip(found, scores.tolist(), strict=True)
    ]

  def settings(self) -> dict[str, Any]:
    """What decides an answer besides the query, as JSON."""
    return {
      "checkpoint": self.encoder.checkpoint,
      "index": fingerprint_of(self.index.info),
      "retrieval": self.retrieval and dataclasses.asdict(self.retrieval),
      "mesh": dict(self.mesh.shape),
      "platform": jax.default_backend(),
      "search": self.index.search_kind,
    }

  def image_vectors(self, queries: Sequence[Query], bad: list[UnreadableImage] | None) -> list[list[np.ndarray]]:
    """For each query the vectors of its first I images that can be read; pictures go through the tower together."""
    pictures = [
      (i, j, image)
      for i, query in enumerate(queries)
      for j, image in enumerate(query.images)
      if not isinstance(image, np.ndarray)
    ]
    features: dict[tuple[int, int], np.ndarray] = {}
    if pictures:
      assert self.pictures is not None  # A model that takes images has it.
      values, reasons = self.pictures([image for _, _, image in pictures])
      for (i, j, _), value, reason in zip(pictures, values, reasons, strict=True):
        if reason is None:
          features[i, j] = value
        elif bad is None:
          raise InputError(f"{queries[i].where}: image {j}: {reason}; mend it or leave it out")
        else:
          bad.append(UnreadableImage(i, j, reason))
    return [
      [
        image if isinstance(image, np.ndarray) else features[i, j]
        for j, image in enumerate(query.images)
        if isinstance(image, np.ndarray) or (i, j) in features
      ]
      for i, query in enumerate(queries)
    ]

  def _filters(self, queries: Sequence[Query]) -> Filters | None:
    """What the queries allow and deny, as ids; None where none says anything."""
    if not any(query.allow is not None or query.categories is not None or query.deny for query in queries):
      return None
    return self.index.filters(
      allow=[query.allow for query in queries],
      deny=[query.deny or None for query in queries],
      categories=[query.categories for query in queries],
    )

  def _augmented(self, embeddings: np.ndarray, k: int, filters: Filters | None) -> tuple[np.ndarray, np.ndarray]:
    """Retrieval-augmented inference. The label search keeps to the filters, too, so that few allowed are not missed."""
    index, how = self.index, self.retrieval
    assert how is not None
    neighbors = retrieval.Neighbors(
      *index.search(embeddings, how.hits, filters), *index.query_index.search(embeddings, how.hits)
    )
    return retrieval.combine(
      neighbors,
      index.query_labels,
      num_labels=index.num_labels,
      lambda_=how.lambda_,
      temperature=how.temperature,
      k=k,
      filters=filters,
    )


def query_format(config: ConfigDict) -> QueryFormat:
  """What the model of a config makes of a query."""
  return QueryFormat(tuple(config.dataset.text_fields), config.images, config.features.dim)


def load(
  workdir: str | os.PathLike,
  search: str | None = None,
  retrieval_augmented: bool = False,
  mesh: Mesh | None = None,
  *,
  retrieval_lambda: float | None = None,
  retrieval_temperature: float | None = None,
  image_checkpoint: str | None = None,
  image_batch_size: int = 8,
) -> Predictor:
  """Loads what training wrote; no training data are needed.

  Args:
    workdir: the folder of the run.
    search: "exact" (on the devices) or "scann" (approximate, on the CPUs); by default as the index was built.
    retrieval_augmented: whether training queries have a say, too.
    mesh: devices to use; by default all, laid out as in training where that fits their number.
    retrieval_lambda: weight of labels against training queries; by default as in the run's evaluation.
    retrieval_temperature: of retrieval; by default as in the run's evaluation.
    image_checkpoint: the SigLIP tower, for pictures; by default the one that made the features of the training data.
    image_batch_size: pictures that go through the tower at a time; fewer cost as much.

  Raises:
    InputError: for whatever is missing, damaged, or of another checkpoint.
  """
  workdir = Path(workdir)
  encoder = load_trained_encoder(workdir, mesh)
  index = LabelIndex.open(workdir / INDEX, checkpoint=encoder.checkpoint, search=search, mesh=encoder.mesh)
  pictures = None
  if encoder.images:
    pictures = QueryImageEncoder(encoder.config, encoder.image_origin or {}, image_checkpoint, image_batch_size)
  how = _retrieval(index, workdir, retrieval_lambda, retrieval_temperature) if retrieval_augmented else None
  return Predictor(encoder, index, pictures, how)


def _retrieval(index: LabelIndex, workdir: Path, lambda_: float | None, temperature: float | None) -> Retrieval:
  """The settings of the evaluation, but for those that are given."""
  chosen = index.retrieval
  if chosen is None:
    raise InputError(
      f"{workdir / INDEX}: holds no training queries, which retrieval augmentation needs; run "
      f"python -m vixml_jax.evaluate --workdir={workdir} --retrieval_augmented"
    )
  how = Retrieval(
    chosen["lambda"] if lambda_ is None else lambda_,
    chosen["temperature"] if temperature is None else temperature,
    chosen["hits"],
  )
  retrieval.check_setting(how.lambda_, how.temperature)
  _ = index.query_index  # Now, since its files go when labels are added or deleted.
  return how
