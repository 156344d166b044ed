"""What a query may be, and its checks: a text, or a title with content, images and filters."""

import base64
import binascii
from collections.abc import Mapping, Sequence
import dataclasses
import io
import numbers
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vixml_jax.datasets.records import join_texts
from vixml_jax.errors import InputError
from vixml_jax.images.feature_set import to_float16

LISTS = ("images", "allow", "deny", "categories")
KEYS = ("uid", "title", "content", *LISTS)
"""Keys of a query, and columns of a file of queries."""

Picture = bytes | Path | np.ndarray
"""An encoded image, a file that holds one, or a feature vector float16 [F]."""


@dataclasses.dataclass(frozen=True)
class Query:
  """A query whose values have been checked.

  Attributes:
    text: as the encoder reads it.
    images: pictures and feature vectors, in their order.
    allow: uids of the only labels that it may have; None for all.
    deny: uids of labels that it may not have.
    categories: names of the only categories whose labels it may have; None for all.
    uid: what its answer is to be found by.
    where: what errors call it.
  """

  text: str
  images: tuple[Picture, ...] = ()
  allow: tuple[str, ...] | None = None
  deny: tuple[str, ...] = ()
  categories: tuple[str, ...] | None = None
  uid: str | None = None
  where: str = "query"


@dataclasses.dataclass(frozen=True)
class QueryFormat:
  """What a model makes of a query.

  Attributes:
    text_fields: the fields that make up an item's text, as in training.
    images: I, the most images; 0 for a model of texts only.
    feature_dim: F.
  """

  text_fields: tuple[str, ...]
  images: int
  feature_dim: int

  @property
  def required(self) -> str:
    """The key that no query may lack: its title, unless the model does not read that."""
    return "title" if "title" in self.text_fields else self.text_fields[0]

  def check_keys(self, keys: Sequence[str], where: str) -> None:
    """Refuses unknown keys, a missing title, and images where the model takes none.

    Raises:
      InputError: naming them.
    """
    unknown = [key for key in keys if key not in KEYS]
    if unknown:
      raise InputError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(KEYS)}")
    if self.required not in keys:
      raise InputError(f"{where}: has no {self.required!r}; every query needs one")
    if "images" in keys and not self.images:
      raise InputError(f"{where}: has 'images', but this model was trained on texts only; leave them out")

  def parse(self, given: str | Mapping[str, Any], where: str, root: Path | None = None) -> Query:
    """Checks a query.

    Args:
      given: a text, or a dict of `KEYS`; None stands for a key that is not there.
      where: what errors call it.
      root: the folder that relative paths of images start from; None for the current one.

    Raises:
      InputError: naming `where`, the key and what it must be.
    """
    if isinstance(given, str):
      return Query(_encodable(given), where=where)
    if not isinstance(given, Mapping):
      raise InputError(f"{where}: must be a text or an object with 'title', not {_kind(given)}")
    values = {key: value for key, value in given.items() if value is not None}
    self.check_keys(list(values), where)
    fields = []
    for field in self.text_fields:
      if not isinstance(values.get(field, ""), str):
        raise InputError(f"{where}: {field!r} must be a text, not {_kind(values[field])}")
      fields.append(_encodable(values.get(field, "")))
    uid = values.get("uid")
    if not isinstance(uid, str | int | None) or isinstance(uid, bool):
      raise InputError(f"{where}: 'uid' must be a text or a whole number, not {_kind(uid)}")
    lists = {key: _list(values[key], key, where) for key in LISTS if key in values}
    images = tuple(self._image(image, where, root) for image in lists.pop("images", ()) if image is not None)
    names = {key: tuple(_name(name, key, where) for name in value) for key, value in lists.items()}
    return Query(join_texts(fields), images, uid=None if uid is None else str(uid), where=where, **names)

  def _image(self, image: Any, where: str, root: Path | None) -> Picture:
    if isinstance(image, bytes | bytearray | memoryview):
      return bytes(image)
    if isinstance(image, str) and image.startswith("data:"):
      return _decoded(image, where)
    if isinstance(image, str | os.PathLike):
      return (root or Path()) / image
    if isinstance(image, Image.Image):
      return _png(image)
    if isinstance(image, np.ndarray | Sequence):
      return self._vector(image, where)
    raise InputError(
      f"{where}: an image must be a path, bytes, a picture of Pillow or a vector of "
      f"{self.feature_dim} numbers, not {_kind(image)}"
    )

  def _vector(self, image: Any, where: str) -> np.ndarray:
    try:
      vector = np.asarray(image, np.float32)
    except (TypeError, ValueError):
      vector = np.zeros(0, np.float32)
    if vector.shape != (self.feature_dim,):
      raise InputError(
        f"{where}: a feature vector of an image must be {self.feature_dim} numbers, but one has shape "
        f"{np.shape(vector)}"
      )
    halves = to_float16(vector)
    if halves is None:
      raise InputError(
        f"{where}: a feature vector of an image has values that are not finite, or that float16 cannot "
        "hold; make it as extract_features does"
      )
    return halves


def _encodable(text: str) -> str:
  """Half a surrogate pair, which JSON can spell, becomes the replacement character, as in the training data."""
  return text.encode(errors="surrogatepass").decode(errors="replace")


def _list(value: Any, key: str, where: str) -> Sequence[Any] | np.ndarray:
  if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | np.ndarray):
    raise InputError(f"{where}: {key!r} must be a list, not {_kind(value)}")
  return value


def _name(value: Any, key: str, where: str) -> str:
  if not isinstance(value, str | numbers.Integral) or isinstance(value, bool):
    raise InputError(f"{where}: {key!r} must be a list of names, but holds {_kind(value)}")
  return str(value)


def _decoded(uri: str, where: str) -> bytes:
  """Bytes of an image that JSON holds as `data:image/png;base64,...`."""
  head, _, body = uri.partition(",")
  try:
    if not head.endswith(";base64"):
      raise ValueError("not base64")
    return base64.b64decode(body, validate=True)
  except (ValueError, binascii.Error) as error:
    raise InputError(
      f"{where}: an image given as data: must be base64 behind 'data:image/...;base64,' ({error})"
    ) from error


def _png(picture: Image.Image) -> bytes:
  """A picture of Pillow as a file: decoded again, it is what its own file would be."""
  buffer = io.BytesIO()
  if picture.mode not in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"):
    picture = picture.convert("RGB")
  picture.save(buffer, "PNG", exif=picture.getexif())
  return buffer.getvalue()


def _kind(value: Any) -> str:
  return "null" if value is None else type(value).__name__
