"""The sizes of a data set that its programs depend on, without the data."""

import dataclasses

from ml_collections import ConfigDict

from vixml_jax.datasets import open_dataset
from vixml_jax.datasets.bucket_sets import shared_sets
from vixml_jax.datasets.builders import EXPECTED_COUNTS
from vixml_jax.errors import InputError

# Mean number of tokens of a text, special tokens included. The title of a product is assumed to have 15; a synthetic
# title with the same number of words has 14.8 (docs/performance.md). The name of an icon has 4 (counted). A title with
# its description is assumed to have `max_length` tokens.
_TITLE, _ICON_NAME = 15.0, 4.0
# Mean number of labels of a training query: the Extreme Classification Repository for LF-Amazon, MUFIN (arXiv
# 2309.04961) for MM-AmazonTitles-300K, counted for MM-Icons-9K; assumed for data sets of one's own.
_LABELS_PER_QUERY = {
  "lf_amazon_titles_131k": 2.29,
  "lf_amazon_131k": 2.29,
  "mm_amazon_titles_300k": 8.13,
  "lf_amazon_titles_1_3m": 22.2,
}
_ASSUMED_LABELS_PER_QUERY = 5.0


@dataclasses.dataclass(frozen=True)
class DataSize:
  """Number of rows of each split, and means over items.

  Attributes:
    train: Number of training queries.
    test: Number of test queries; used only for the size of the image features.
    labels: Number of labels L.
    tokens: Mean number of tokens of a text, special tokens included.
    images: Mean number of images of an item.
    labels_per_query: Mean number of labels of a training query.
  """

  train: int
  test: int
  labels: int
  tokens: float
  images: float
  labels_per_query: float = _ASSUMED_LABELS_PER_QUERY

  @property
  def num_images(self) -> int:
    """Number of image feature vectors of all items."""
    return round((self.train + self.test + self.labels) * self.images)


def data_size(
  config: ConfigDict,
  num_queries: int | None = None,
  num_labels: int | None = None,
  tokens: float | None = None,
  images: float | None = None,
) -> DataSize:
  """Returns the size of a config's data set: the given numbers, else the published ones, else those of prepared data.

  Args:
    config: The whole config.
    num_queries: Number of training queries.
    num_labels: Number of labels L.
    tokens: Mean number of tokens of a text, special tokens included; None to assume it.
    images: Mean number of images of an item; None for the most that the config allows.

  Raises:
    InputError: If a number is neither given nor known, or is out of range.
  """
  data = config.dataset
  given = {"train": num_queries, "labels": num_labels}
  counts = EXPECTED_COUNTS.get(data.name) or ({} if None not in given.values() else _prepared(data))
  known = {"test": 0, **counts, **{split: count for split, count in given.items() if count is not None}}
  tokens = min(_assumed_tokens(data), data.max_length) if tokens is None else tokens
  images = config.images if images is None else images
  _check("num_queries", known["train"], known["train"] >= 1, "must be at least 1")
  _check("num_labels", known["labels"], known["labels"] >= 1, "must be at least 1")
  _check(
    "tokens_per_item",
    tokens,
    3 <= tokens <= data.max_length,
    f"must be between 3 and config.dataset.max_length={data.max_length}",
  )
  _check(
    "images_per_item", images, 0 <= images <= config.images, f"must be between 0 and config.images={config.images}"
  )
  each = min(_LABELS_PER_QUERY.get(data.name, _ASSUMED_LABELS_PER_QUERY), known["labels"])
  return DataSize(known["train"], known["test"], known["labels"], float(tokens), float(images), each)


def _assumed_tokens(data: ConfigDict) -> float:
  if data.name == "mm_icons_9k":
    return _ICON_NAME
  return _TITLE if tuple(data.text_fields) == ("title",) else data.max_length


def _prepared(data: ConfigDict) -> dict[str, int]:
  try:
    with shared_sets(data.data_dir, data.name) as data_dir:
      return dict(open_dataset(data.name, data_dir).info.metadata["counts"])
  except InputError as error:
    raise InputError(f"{data.name}: its size is not known ({error}); give --num_queries and --num_labels") from error


def _check(flag: str, value: float, holds: bool, rule: str) -> None:
  if not holds:
    raise InputError(f"--{flag}={value:g}: {rule}")
