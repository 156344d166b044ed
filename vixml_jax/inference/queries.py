"""The form of a query and its checks: a text, or a title with content, images and filters."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import io
import numbers
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from vixml_jax.datasets.records import join_texts
from vixml_jax.errors import InputError, listed
from vixml_jax.images.decoding import from_data_uri
from vixml_jax.images.feature_set import to_float16
from vixml_jax.images.tower import PreparedImage

LISTS = ("images", "allow", "deny", "categories")
KEYS = ("uid", "title", "content", *LISTS)
"""Keys of a query, and columns of a file of queries."""
_KNOWN = frozenset(KEYS)

QueryImage = bytes | Path | PreparedImage | np.ndarray
"""An encoded image, a file with one, an image prepared for the tower, or a feature vector float16 [F]."""


@dataclasses.dataclass(frozen=True)
class Query:
  """A query whose values have been checked.

  Attributes:
    text: Text that the encoder reads.
    images: Images and feature vectors, in their order.
    allow: Uids of the only labels that the query may have; None for all labels.
    deny: Uids of labels that the query may not have.
    categories: Names of the only categories whose labels the query may have; None for all labels.
    uid: Name of the query in the results.
    where: Name of the query in error messages, such as a file and a line.
  """

  text: str
  images: tuple[QueryImage, ...] = dataclasses.field(default=(), repr=False)
  allow: tuple[str, ...] | None = None
  deny: tuple[str, ...] = ()
  categories: tuple[str, ...] | None = None
  uid: str | None = None
  where: str = "query"


@dataclasses.dataclass(frozen=True)
class QueryFormat:
  """The form of queries that a model takes.

  Attributes:
    text_fields: Fields that are joined to an item's text, as in training.
    images: I, the largest number of images; 0 for a model of texts only.
    feature_dim: F, the size of an image's feature vector.
  """

  text_fields: tuple[str, ...]
  images: int
  feature_dim: int

  @property
  def required(self) -> str:
    """The key that every query must have: `title`, unless the model does not read it."""
    return "title" if "title" in self.text_fields else self.text_fields[0]

  def check_keys(self, keys: Collection[str], where: str) -> None:
    """Checks the keys of a query, or the columns of a file of queries.

    Raises:
      InputError: A key is unknown, the title is missing, or there are images and the model takes none.
    """
    if not _KNOWN.issuperset(keys):
      unknown = [key for key in keys if key not in KEYS]
      raise InputError(f"{where}: unknown {listed(unknown)}; known are {', '.join(KEYS)}")
    if self.required not in keys:
      raise InputError(f"{where}: has no {self.required!r}; every query needs one")
    if "images" in keys and not self.images:
      raise InputError(f"{where}: has 'images', but this model was trained on texts only; leave them out")

  def parse(self, given: str | Mapping[str, Any], where: str, root: Path | None = None) -> Query:
    """Checks a query and returns it.

    Args:
      given: A text, or a dict with `KEYS`. A key with the value None counts as absent.
      where: Name of the query in error messages.
      root: Folder of relative paths of images; None for the current one.

    Raises:
      InputError: A value is wrong; the message names `where`, the key and what the value must be.
    """
    if isinstance(given, str):
      return Query(_encodable(given), where=where)
    if not isinstance(given, Mapping):
      raise InputError(f"{where}: must be a text or an object with 'title', not {_kind(given)}")
    values = {key: value for key, value in given.items() if value is not None}
    self.check_keys(values, where)
    texts = []
    for field in self.text_fields:
      text = values.pop(field, "")
      if not isinstance(text, str):
        raise InputError(f"{where}: {field!r} must be a text, not {_kind(text)}")
      texts.append(_encodable(text))
    text = join_texts(texts)
    if not values:
      return Query(text, where=where)
    uid = values.get("uid")
    if not isinstance(uid, str | int | None) or isinstance(uid, bool):
      raise InputError(f"{where}: 'uid' must be a text or a whole number, not {_kind(uid)}")
    lists = {key: _list(values[key], key, where) for key in LISTS if key in values}
    images = tuple(self._image(image, where, root) for image in lists.pop("images", ()) if image is not None)
    names = {key: tuple(_name(name, key, where) for name in value) for key, value in lists.items()}
    return Query(text, images, uid=None if uid is None else _encodable(str(uid)), where=where, **names)

  def _image(self, image: Any, where: str, root: Path | None) -> QueryImage:
    if isinstance(image, PreparedImage):
      return image
    if isinstance(image, bytes | bytearray | memoryview):
      return bytes(image)
    if isinstance(image, str) and image.startswith("data:"):
      try:
        return from_data_uri(image)
      except ValueError as error:
        raise InputError(f"{where}: an image is {error}; write data: URIs as data:image/...;base64,...") from error
    if isinstance(image, str | os.PathLike):
      return (root or Path()) / image
    if isinstance(image, Image.Image):
      return _png(image)
    if isinstance(image, np.ndarray | Sequence):
      return self._vector(image, where)
    raise InputError(
      f"{where}: an image must be a path, bytes, a Pillow image or a vector of {self.feature_dim} numbers, "
      f"not {_kind(image)}"
    )

  def _vector(self, image: np.ndarray | Sequence[Any], where: str) -> np.ndarray:
    try:
      if not isinstance(image, np.ndarray) and any(isinstance(number, str | bool) for number in image):
        raise TypeError  # numpy would convert them.
      with np.errstate(over="ignore"):
        vector = np.asarray(image, np.float32)
    except OverflowError:
      vector = np.full(np.shape(image), np.inf, np.float32)
    except (TypeError, ValueError):
      raise InputError(f"{where}: a feature vector of an image must be {self.feature_dim} numbers") from None
    if vector.shape != (self.feature_dim,):
      raise InputError(
        f"{where}: a feature vector of an image must be {self.feature_dim} numbers, but one has shape "
        f"{np.shape(vector)}"
      )
    halves = to_float16(vector)
    if halves is None:
      raise InputError(
        f"{where}: a feature vector of an image has values that are not finite or exceed float16; use vectors that "
        "extract_features made"
      )
    return halves


def query_format(config: ConfigDict) -> QueryFormat:
  """Returns the form of queries that the model of a config takes."""
  return QueryFormat(tuple(config.dataset.text_fields), config.images, config.features.dim)


def _encodable(text: str) -> str:
  """Replaces each half of a surrogate pair, which JSON can spell, as was done in the training data."""
  return text if text.isascii() else text.encode(errors="surrogatepass").decode(errors="replace")


def _list(value: Any, key: str, where: str) -> Sequence[Any] | np.ndarray:
  if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | np.ndarray):
    raise InputError(f"{where}: {key!r} must be a list, not {_kind(value)}")
  return value


def _name(value: Any, key: str, where: str) -> str:
  if not isinstance(value, str | numbers.Integral) or isinstance(value, bool):
    raise InputError(f"{where}: {key!r} must be a list of names, but contains {_kind(value)}")
  return str(value)


def _png(image: Image.Image) -> bytes:
  """Returns a Pillow image as a PNG file, which decodes to the same pixels as the file that the image came from."""
  buffer = io.BytesIO()
  if image.mode not in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"):
    image = image.convert("RGB")
  image.save(buffer, "PNG", exif=image.getexif())
  return buffer.getvalue()


def _kind(value: Any) -> str:
  return "null" if value is None else type(value).__name__
