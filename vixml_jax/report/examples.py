"""A few queries with their pictures, what was predicted for them and what is true, for people to look at."""

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

NUMBER = 30
_SHOWN = 5
_MOST_TRUE = 12
_MOST_PICTURES = 3
_MOST_CHARACTERS = 300
_SIDE = 96


@dataclasses.dataclass(frozen=True)
class ShownPrediction:
  """A label that was predicted: its text, its score, and whether it is right."""

  text: str
  score: float
  hit: bool


@dataclasses.dataclass(frozen=True)
class TrueLabel:
  """A label of the query: its text, and for each ranking its rank from 1 on, None beyond the evaluation's depth."""

  text: str
  ranks: dict[str, int | None]

  @property
  def shown(self) -> bool:
    """Whether it is among the predictions of an example."""
    return any(rank is not None and rank <= _SHOWN for rank in self.ranks.values())


@dataclasses.dataclass(frozen=True)
class Example:
  """A query.

  Attributes:
    text: what the model read, cut after 300 characters.
    pictures: small WebP images as data URIs, as many as three.
    predictions: the first five of each ranking.
    truth: at most 12 of its labels, those ranked best by the last ranking first.
    hidden: how many more labels it has.
  """

  text: str
  pictures: list[str]
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
  number: int = NUMBER,
) -> list[Example]:
  """Draws queries that have labels, the same for every model on the same data, and reads what belongs to them.

  Args:
    corpus: for texts and images.
    split: "train" or "test", which the queries are rows of.
    rows: int64 [Q], the row of each query.
    truth: positives of the queries, Q rows.
    ids: for each ranking int32 [Q, K]; -1 where there is none.
    scores: for each ranking float32 [Q, K].
    number: how many; fewer where there are fewer queries.
  """
  labeled = np.flatnonzero(truth.lengths)
  chosen = np.sort(np.random.default_rng(0).choice(labeled, min(number, len(labeled)), replace=False))
  wanted = [truth[query] for query in chosen] + [found[query][:_SHOWN] for found in ids.values() for query in chosen]
  labels = np.unique(np.concatenate([np.zeros(0, np.int32), *wanted]))
  labels = labels[labels >= 0]
  texts = dict(zip(labels.tolist(), map(_cut, corpus.label_text(labels.tolist())), strict=True))
  records = Records(corpus.builder, split).take(rows[chosen])
  examples = []
  for query, record in zip(chosen, records, strict=True):
    true = truth[query].tolist()
    ranked = _true_labels(true, {name: found[query].tolist() for name, found in ids.items()}, texts)
    examples.append(
      Example(
        _cut(record.text(corpus.text_fields)),
        _pictures(record.images()),
        {name: _predictions(found[query], scores[name][query], set(true), texts) for name, found in ids.items()},
        ranked[:_MOST_TRUE],
        max(len(ranked) - _MOST_TRUE, 0),
      )
    )
  return examples


def _predictions(
  ids: np.ndarray, scores: np.ndarray, true: set[int], texts: Mapping[int, str]
) -> list[ShownPrediction]:
  shown = zip(ids[:_SHOWN].tolist(), scores[:_SHOWN].tolist(), strict=True)
  return [ShownPrediction(texts[label], score, label in true) for label, score in shown if label >= 0]


def _true_labels(
  true: Sequence[int], rankings: Mapping[str, Sequence[int]], texts: Mapping[int, str]
) -> list[TrueLabel]:
  """A query's labels, the best ranked first."""
  places = {name: {label: rank for rank, label in enumerate(ids, 1)} for name, ids in rankings.items()}
  last = places[list(places)[-1]]
  order = sorted(dict.fromkeys(true), key=lambda label: last.get(label, len(last) + 1))
  return [TrueLabel(texts[label], {name: ranks.get(label) for name, ranks in places.items()}) for label in order]


def _cut(text: str) -> str:
  return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS].rstrip() + " …"


def _pictures(blobs: Sequence[tuple[int, bytes]]) -> list[str]:
  """The first pictures that can be read, small enough to stand in a page."""
  pictures = []
  for _, blob in blobs:
    try:
      pixels = decoding.decode(blob)
    except decoding.BadImage:
      continue
    pictures.append(_data_uri(pixels))
    if len(pictures) == _MOST_PICTURES:
      break
  return pictures


def _data_uri(pixels: np.ndarray) -> str:
  image = Image.fromarray(pixels)
  image.thumbnail((_SIDE, _SIDE))
  buffer = io.BytesIO()
  image.save(buffer, "WEBP", quality=75)
  return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
