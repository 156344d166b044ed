"""Items to encode: queries or labels, each with a text and images."""

import dataclasses

import numpy as np

from vixml_jax.ragged import Ragged


@dataclasses.dataclass(frozen=True)
class Items:
  """Texts with their images.

  Attributes:
    tokens: Token ids of every item.
    images: Rows of the image features that belong to every item, by ascending slot.
  """

  tokens: Ragged
  images: Ragged

  def __post_init__(self) -> None:
    if len(self.tokens) != len(self.images):
      raise ValueError(f"{len(self.tokens)} texts but images of {len(self.images)} items")

  def __len__(self) -> int:
    return len(self.tokens)

  @classmethod
  def of_texts(cls, tokens: Ragged) -> "Items":
    """Makes items without images."""
    return cls(tokens, Ragged(np.zeros(0, np.int32), np.zeros(len(tokens) + 1, np.int64)))

  def take(self, rows: np.ndarray) -> "Items":
    """Returns the given items in the given order, copied into memory."""
    return Items(self.tokens.take(rows), self.images.take(rows))

  def first_images(self, count: int) -> "Items":
    """Returns the same items with at most their first `count` images."""
    return Items(self.tokens, self.images.first(count))

  def without_images(self, dropped: np.ndarray) -> "Items":
    """Returns the same items, without the images of those where `dropped` (bool [items]) is True."""
    keep = ~np.repeat(dropped, self.images.lengths)
    lengths = np.where(dropped, 0, self.images.lengths)
    return Items(self.tokens, Ragged.of_lengths(self.images.values[keep], lengths))

  def followed_by(self, other: "Items") -> "Items":
    """Returns these items followed by the others."""
    return Items(self.tokens.followed_by(other.tokens), self.images.followed_by(other.images))
