"""How large a data set is, as far as its programs can tell, without the data."""

import dataclasses

from ml_collections import ConfigDict

from vixml_jax.datasets import open_dataset
from vixml_jax.datasets.builders import EXPECTED_COUNTS
from vixml_jax.errors import InputError

# Mean tokens of a text, special ones included: a title of a product (assumed; a synthetic one of the same number of
# words has 14.8, docs/performance.md), and the name of an icon (counted). A product's title with its description fills
# `max_length`.
_TITLE, _ICON_NAME = 15.0, 4.0


@dataclasses.dataclass(frozen=True)
class DataSize:
  """Rows of each split, and what an item has on average.

  Attributes:
    train: training queries.
    test: test queries; they count for the bank of image features only.
    labels: L.
    tokens: mean tokens of a text, special ones included.
    images: mean images of an item.
  """

  train: int
  test: int
  labels: int
  tokens: float
  images: float

  @property
  def num_images(self) -> int:
    """Vectors in the bank of image features."""
    return round((self.train + self.test + self.labels) * self.images)


def data_size(
  config: ConfigDict,
  num_queries: int | None = None,
  num_labels: int | None = None,
  tokens: float | None = None,
  images: float | None = None,
) -> DataSize:
  """The size of a config's data set: what is given, else what is published, else what has been prepared.

  Args:
    config: the whole config.
    num_queries: training queries.
    num_labels: L.
    tokens: mean tokens of a text, special ones included; else assumed.
    images: mean images of an item; else the most that the config allows.

  Raises:
    InputError: if a number is neither given nor known, or is out of range.
  """
  data = config.dataset
  given = {"train": num_queries, "labels": num_labels}
  counts = EXPECTED_COUNTS.get(data.name) or ({} if None not in given.values() else _prepared(data))
  known = {"test": 0, **counts, **{split: count for split, count in given.items() if count is not None}}
  if tokens is None:
    tokens = (
      _ICON_NAME
      if data.name == "mm_icons_9k"
      else _TITLE
      if tuple(data.text_fields) == ("title",)
      else (data.max_length)
    )
    tokens = min(tokens, data.max_length)
  images = config.images if images is None else images
  _check("num_queries", known["train"], known["train"] >= 1, "must be at least 1")
  _check("num_labels", known["labels"], known["labels"] >= 1, "must be at least 1")
  _check(
    "tokens_per_item",
    tokens,
    3 <= tokens <= data.max_length,
    f"must lie between 3 and config.dataset.max_length={data.max_length}",
  )
  _check(
    "images_per_item", images, 0 <= images <= config.images, f"must lie between 0 and config.images={config.images}"
  )
  return DataSize(known["train"], known["test"], known["labels"], float(tokens), float(images))


def _prepared(data: ConfigDict) -> dict[str, int]:
  try:
    return dict(open_dataset(data.name, data.data_dir).info.metadata["counts"])
  except InputError as error:
    raise InputError(f"{data.name}: its size is not known ({error}); give --num_queries and --num_labels") from error


def _check(flag: str, value: float, holds: bool, rule: str) -> None:
  if not holds:
    raise InputError(f"--{flag}={value:g}: {rule}")
