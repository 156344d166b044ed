"""Collects example queries for the report: text, images, predicted labels and true labels."""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import io

import numpy as np
from PIL import Image

from vixml_jax.datasets.records import Records
from vixml_jax.images import decoding
from vixml_jax.input.corpus import Corpus
from vixml_jax.ragged import Ragged

_NUM_PREDICTIONS = 5
_MAX_TRUE_LABELS = 12
_MAX_IMAGES = 3
_MAX_CHARACTERS = 300
_IMAGE_SIZE = 96  # Pixels of the longer side.


@dataclasses.dataclass(frozen=True)
class ShownPrediction:
  """A predicted label.

  Attributes:
    text: Text of the label.
    score: Score of the prediction.
    hit: Whether the label is a true label of the query.
  """

  text: str
  score: float
  hit: bool


@dataclasses.dataclass(frozen=True)
class TrueLabel:
  """A true label of a query.

  Attributes:
    text: Text of the label.
    ranks: Rank of the label in each ranking, from 1; None if the ranking does not contain it.
  """

  text: str
  ranks: dict[str, int | None]

  @property
  def shown(self) -> bool:
    """Whether the label is among the predictions that the example shows."""
    return any(rank is not None and rank <= _NUM_PREDICTIONS for rank in self.ranks.values())


@dataclasses.dataclass(frozen=True)
class Example:
  """A query as the report shows it.

  Attributes:
    text: Text that the model reads, cut after 300 characters.
    images: At most three small WebP images, as data URIs.
    predictions: First five predictions of each ranking.
    truth: At most 12 true labels, sorted by their rank in the last ranking.
    hidden: Number of true labels that are left out.
  """

  text: str
  images: list[str]
  predictions: dict[str, list[ShownPrediction]]
  truth: list[TrueLabel]
  hidden: int


def collect_examples(
  corpus: Corpus,
  split: str,
  rows: np.ndarray,
  truth: Ragged,
  ids: Mapping[str, np.ndarray],
  scores: Mapping[str, np.ndarray],
) -> list[Example]:
  """Returns the given queries with what the report shows of them.

  Args:
    corpus: Data set with texts and images.
    split: Split of the queries, "train" or "test".
    rows: Row of each query in the split, int64 [E].
    truth: Positives of the queries, E rows.
    ids: Labels from best to worst of each ranking, int32 [E, K]; -1 where there is no prediction.
    scores: Scores of these labels, float32 [E, K].
  """
  wanted = [truth[query] for query in range(len(rows))] + [
    found[:, :_NUM_PREDICTIONS].ravel() for found in ids.values()
  ]
  labels = np.unique(np.concatenate([np.zeros(0, np.int32), *wanted]))
  labels = labels[labels >= 0]
  texts = dict(zip(labels.tolist(), map(_cut, corpus.label_text(labels.tolist())), strict=True))
  records = Records(corpus.builder, split).take(rows.tolist())
  examples = []
  for query, record in enumerate(records):
    true = truth[query].tolist()
    ranked = _true_labels(true, {name: found[query].tolist() for name, found in ids.items()}, texts)
    examples.append(
      Example(
        _cut(record.text(corpus.text_fields)),
        _images(record.images()),
        {name: _predictions(found[query], scores[name][query], set(true), texts) for name, found in ids.items()},
        ranked[:_MAX_TRUE_LABELS],
        max(len(ranked) - _MAX_TRUE_LABELS, 0),
      )
    )
  return examples


def _predictions(
  ids: np.ndarray, scores: np.ndarray, true: set[int], texts: Mapping[int, str]
) -> list[ShownPrediction]:
  shown = zip(ids[:_NUM_PREDICTIONS].tolist(), scores[:_NUM_PREDICTIONS].tolist(), strict=True)
  return [ShownPrediction(texts[label], score, label in true) for label, score in shown if label >= 0]


def _true_labels(
  true: Sequence[int], rankings: Mapping[str, Sequence[int]], texts: Mapping[int, str]
) -> list[TrueLabel]:
  """Returns the true labels of a query, sorted by their rank in the last ranking."""
  places = {name: {label: rank for rank, label in enumerate(ids, 1)} for name, ids in rankings.items()}
  last = places[list(places)[-1]]
  order = sorted(dict.fromkeys(true), key=lambda label: last.get(label, len(last) + 1))
  return [TrueLabel(texts[label], {name: ranks.get(label) for name, ranks in places.items()}) for label in order]


def _cut(text: str) -> str:
  return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS].rstrip() + " …"


def _images(blobs: Sequence[tuple[int, bytes]]) -> list[str]:
  """Returns the first images that can be decoded, as data URIs of thumbnails."""
  images: list[str] = []
  for _, blob in blobs:
    try:
      pixels = decoding.decode(blob)
    except decoding.BadImage:
      continue
    images.append(_data_uri(pixels))
    if len(images) == _MAX_IMAGES:
      break
  return images


def _data_uri(pixels: np.ndarray) -> str:
  image = Image.fromarray(pixels)
  image.thumbnail((_IMAGE_SIZE, _IMAGE_SIZE))
  buffer = io.BytesIO()
  image.save(buffer, "WEBP", quality=75)
  return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
