"""Prediction from a workdir: encodes queries, searches the label index, and returns uids and texts of labels."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of
from vixml_jax.inference.predictions import Prediction, PredictionColumns
from vixml_jax.inference.queries import Query, query_format
from vixml_jax.inference.query_images import QueryImageEncoder
from vixml_jax.inference.trained_encoder import TrainedEncoder, load_trained_encoder
from vixml_jax.ragged import Ragged
from vixml_jax.run.workdir import INDEX
from vixml_jax.search import retrieval_augmented
from vixml_jax.search.filters import Filters
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.retrieval_augmented import RetrievalSettings

GivenQuery = str | Mapping[str, Any] | Query


class UnreadableImage(NamedTuple):
  """An image without pixels.

  Attributes:
    query: Position of the query in the call, from 0.
    image: Position of the image in the query, from 0.
    reason: Why the image has no pixels.
  """

  query: int
  image: int
  reason: str


class LabelSearch(Protocol):
  """A search of the labels of an index, such as `LabelIndex.search`."""

  def __call__(
    self, queries: np.ndarray | jax.Array, k: int, filters: Filters | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and ids as `LabelIndex.search` does."""


@dataclasses.dataclass(frozen=True, repr=False)
class Predictor:
  """Answers queries; `load` makes it.

  Attributes:
    encoder: Encoder of texts and images.
    index: Index of the labels.
    image_encoder: Encoder of images to feature vectors; None for a model of texts only.
    retrieval: Settings of retrieval-augmented inference; None for plain search.
    label_search: Search of the labels to use instead of `index.search`.
  """

  encoder: TrainedEncoder
  index: LabelIndex
  image_encoder: QueryImageEncoder | None
  retrieval: RetrievalSettings | None
  label_search: LabelSearch | None = None

  def __repr__(self) -> str:
    return (
      f"Predictor(workdir={str(self.encoder.workdir)!r}, step={self.encoder.checkpoint['step']}, "
      f"labels={self.index.num_live}, images={self.encoder.images}, search={self.index.search_kind!r}, "
      f"retrieval={self.retrieval})"
    )

  @property
  def mesh(self) -> Mesh:
    """Devices that encode and search."""
    return self.encoder.mesh

  def predict(self, queries: Sequence[GivenQuery], k: int = 10) -> list[list[Prediction]]:
    """Returns the k labels of highest score for each query.

    Example:
      predictor = vixml_jax.load("runs/quickstart")
      predictor.predict(["arrow up", {"title": "cloud", "deny": ["tag/arrow_up"]}], k=5)

    Args:
      queries: Each a text, or a dict with `title` and optionally `content`, `images` (a list of paths, bytes, Pillow
        images or feature vectors [F]), `allow` and `deny` (lists of uids of labels) and `categories`.
      k: Number of labels, 1 to the number of labels in the index.

    Returns:
      For each query its labels, best first. There are fewer than k if filters leave fewer, or, with retrieval
      augmentation, if fewer have a share of probability.

    Raises:
      InputError: A query is wrong (the message names its position from 0), or k is.
    """
    checked = self.checked(queries)
    self.check_k(k)
    return self.named(*self.search(self.encode(checked), k, self.filters(checked))) if checked else []

  def checked(self, queries: Sequence[GivenQuery]) -> list[Query]:
    """Checks the queries of a call and returns them.

    Raises:
      InputError: A query is wrong; the message names its position from 0.
    """
    if isinstance(queries, str | Mapping):
      raise InputError("queries: must be a list of queries; put a single one into brackets")
    form = query_format(self.encoder.config)
    return [query if isinstance(query, Query) else form.parse(query, f"query {i}") for i, query in enumerate(queries)]

  def check_k(self, k: int) -> None:
    """Checks the number of labels that are asked for.

    Raises:
      InputError: It is out of range.
    """
    if not 1 <= k <= self.index.num_live:
      raise InputError(f"k={k}: must be 1 to {self.index.num_live}, the number of labels")

  def encode(
    self,
    queries: Sequence[GivenQuery],
    *,
    tokens: Ragged | None = None,
    unreadable: list[UnreadableImage] | None = None,
    whole_chunks: bool = False,
  ) -> np.ndarray:
    """Returns embeddings of unit norm, float32 [Q, D].

    Args:
      queries: Queries as for `predict`.
      tokens: What `encoder.tokenizer` returned for the texts of the queries; None to tokenize them here.
      unreadable: List that images without pixels are appended to; their queries are encoded without them. None to
        raise an error for such an image.
      whole_chunks: See `TrainedEncoder.embed`.

    Raises:
      InputError: A query is wrong; the message names it.
    """
    checked = self.checked(queries)
    vectors = self.image_vectors(checked, unreadable) if self.encoder.images else None
    texts = [query.text for query in checked] if tokens is None else tokens
    return self.encoder.embed(texts, vectors, whole_chunks=whole_chunks)

  def filters(self, queries: Sequence[Query]) -> Filters | None:
    """Returns the labels that each query allows and denies, as ids; None if no query has a filter.

    Raises:
      InputError: A uid or a category is unknown; the message names it.
    """
    if not any(query.allow is not None or query.categories is not None or query.deny for query in queries):
      return None
    return self.index.filters(
      allow=[query.allow for query in queries],
      deny=[query.deny for query in queries],
      categories=[query.categories for query in queries],
    )

  def search(self, embeddings: np.ndarray, k: int, filters: Filters | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best labels of embedded queries.

    Args:
      embeddings: Embeddings [Q, D].
      k: Number of labels for each query.
      filters: Labels that each query may have, from `filters`.

    Returns:
      Scores float32 [Q, K], descending, and ids int32 [Q, K]. Score -inf and id -1 fill the places of a query with
      fewer labels.
    """
    search = self.label_search or self.index.search
    if self.retrieval is None:
      return search(embeddings, k, filters)
    # The label search applies the filters too, so that a query with few allowed labels finds them.
    neighbors = retrieval_augmented.Neighbors(
      *search(embeddings, self.retrieval.hits, filters),
      *self.index.query_index.search(embeddings, self.retrieval.num_query_hits),
    )
    if self.retrieval.joint:
      # Training queries are not filtered. They would take the places of the few labels that a query may have.
      limited = None if filters is None or filters.allow is None else filters.allow.has_set
      neighbors = neighbors.nearest(self.retrieval.hits, None if limited is None else ~limited)
    return retrieval_augmented.combine(
      neighbors,
      self.index.query_labels,
      num_labels=self.index.num_labels,
      lambda_=self.retrieval.lambda_,
      temperature=self.retrieval.temperature,
      k=k,
      filters=filters,
    )

  def named(self, scores: np.ndarray, ids: np.ndarray) -> list[list[Prediction]]:
    """Returns results of `search` with uids and texts, without empty places."""
    return self.columns(scores, ids).rows()

  def columns(self, scores: np.ndarray, ids: np.ndarray) -> PredictionColumns:
    """Returns what `named` returns as columns."""
    filled = ids >= 0
    distinct, places = np.unique(ids[filled], return_inverse=True)
    labels = zip(self.index.uids(distinct), distinct.tolist(), self.index.texts(distinct), strict=True)
    return PredictionColumns(list(labels), places, scores[filled], filled.sum(axis=1))

  def settings(self) -> dict[str, Any]:
    """Returns all that determines an answer besides the query, as JSON."""
    return {
      "checkpoint": self.encoder.checkpoint,
      "index": fingerprint_of(self.index.info),
      "retrieval": self.retrieval and dataclasses.asdict(self.retrieval),
      "mesh": dict(self.mesh.shape),
      "platform": jax.default_backend(),
      "search": self.index.search_kind,
    }

  def image_vectors(self, queries: Sequence[Query], unreadable: list[UnreadableImage] | None) -> list[list[np.ndarray]]:
    """Returns the feature vectors of each query's images; the images of all queries are encoded together.

    Args:
      queries: Checked queries.
      unreadable: As for `encode`.

    Raises:
      InputError: An image has no pixels and `unreadable` is None.
    """
    images = {
      (i, j): image
      for i, query in enumerate(queries)
      for j, image in enumerate(query.images)
      if not isinstance(image, np.ndarray)
    }
    vectors: dict[tuple[int, int], np.ndarray] = {}
    if images:
      assert self.image_encoder is not None  # A model that takes images has one.
      values, reasons = self.image_encoder(list(images.values()))
      for (i, j), value, reason in zip(images, values, reasons, strict=True):
        if reason is None:
          vectors[i, j] = value
        elif unreadable is None:
          raise InputError(f"{queries[i].where}: image {j}: {reason}; correct it or leave it out")
        else:
          unreadable.append(UnreadableImage(i, j, reason))
    return [
      [
        image if isinstance(image, np.ndarray) else vectors[i, j]
        for j, image in enumerate(query.images)
        if isinstance(image, np.ndarray) or (i, j) in vectors
      ]
      for i, query in enumerate(queries)
    ]


def load(
  workdir: str | os.PathLike[str],
  search: str | None = None,
  retrieval_augmented: bool = False,
  mesh: Mesh | None = None,
  *,
  retrieval_lambda: float | None = None,
  retrieval_temperature: float | None = None,
  image_checkpoint: str | None = None,
  image_batch_size: int = 8,
) -> Predictor:
  """Loads a trained workdir. No training data are needed.

  Args:
    workdir: Folder of the run.
    search: "exact" (on the devices) or "scann" (approximate, on the CPU); None for the kind that the index was written
      for.
    retrieval_augmented: Whether to use retrieval-augmented inference.
    mesh: Devices to use; None for all devices, in the layout of training if that fits their number.
    retrieval_lambda: Weight of the labels against that of the training queries; None for that of the run's evaluation.
    retrieval_temperature: Temperature of retrieval; None for that of the run's evaluation.
    image_checkpoint: SigLIP tower that encodes images; None for the one that made the features of the training data.
    image_batch_size: Number of images that the tower encodes at a time. A smaller batch takes as long as a full one.

  Raises:
    InputError: A file is missing, damaged, or of another checkpoint.
  """
  workdir = Path(workdir)
  encoder = load_trained_encoder(workdir, mesh)
  index = LabelIndex.open(workdir / INDEX, checkpoint=encoder.checkpoint, search=search, mesh=encoder.mesh)
  image_encoder = None
  if encoder.images:
    image_encoder = QueryImageEncoder(encoder.config, encoder.image_origin or {}, image_checkpoint, image_batch_size)
  settings = None
  if retrieval_augmented:
    settings = _retrieval_settings(index, workdir, retrieval_lambda, retrieval_temperature)
  return Predictor(encoder, index, image_encoder, settings)


def _retrieval_settings(
  index: LabelIndex, workdir: Path, lambda_: float | None, temperature: float | None
) -> RetrievalSettings:
  """Returns the settings of the evaluation, with the given values in place of its own."""
  stored = index.retrieval
  if stored is None:
    raise InputError(
      f"{workdir / INDEX}: has no training queries, which retrieval-augmented inference needs; run "
      f"python -m vixml_jax.evaluate --workdir={workdir} --retrieval_augmented"
    )
  settings = RetrievalSettings.from_json(stored)
  settings = dataclasses.replace(
    settings,
    lambda_=settings.lambda_ if lambda_ is None else lambda_,
    temperature=settings.temperature if temperature is None else temperature,
  )
  retrieval_augmented.check_setting(settings.lambda_, settings.temperature)
  _ = index.query_index  # Opened now, because the next snapshot removes its files.
  return settings
