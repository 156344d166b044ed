"""Checks and converts the values of a table: texts, uids, names of labels, relevance, images."""

from collections.abc import Callable, Mapping, Sequence
import math
from pathlib import Path
from typing import Any

import numpy as np

from vixml_jax.datasets.raw_images import is_encoded_image
from vixml_jax.record_files import JSON, json_fault


class CellError(ValueError):
  """A value cannot be used. The message is the end of an `InputError` that names the file, the line and the column."""


_LARGEST = float(np.finfo(np.float32).max)
_SEPARATORS = ("|", ";", ",", "\t")
_NAMES = {"\t": "a tab"}
_JSON_ADVICE = 'a list is written as ["a", "b"], in pandas by .map(json.dumps)'
_URLS = ("http://", "https://")


def is_absent(value: Any) -> bool:
  """Returns whether a value stands for none: None, an empty text, or NaN, which pandas uses."""
  return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))


def text_of(value: Any, *, may_be_empty: bool = False) -> str:
  """Returns a text without white space at its ends; None counts as empty.

  Args:
    value: Value of a cell.
    may_be_empty: Whether an empty text is accepted.

  Raises:
    CellError: The value is not a text, is empty, or has characters that no file can store.
  """
  if isinstance(value, str):
    text = value.strip()
  elif is_absent(value):
    text = ""
  else:
    raise CellError(f"must be a text, not {_kind(value)}; convert the column")
  if text:
    _check_characters(text)
  elif not may_be_empty:
    raise CellError("is empty; give it a text, or remove the row")
  return text


def uid_of(value: Any) -> str:
  """Returns a uid: a text or a whole number.

  Raises:
    CellError: The value is something else, or empty.
  """
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return text_of(value)


class LabelCells:
  """Reads the names of the labels of a row: a list, a JSON list, or one text with a separator.

  The separator of a column is found by looking at all its cells with `look`, and then deciding with `decide`.
  """

  def __init__(self, separator: str | None):
    """Takes the separator of the user; None for one that the cells decide, "" for one label in each cell."""
    self._given = separator
    self._separator = separator or ""
    self._is_json = False
    self._seen: dict[str, tuple[int, int]] = {}
    self._texts = 0

  def look(self, value: Any, row: int) -> None:
    """Looks at the cell of a row."""
    if self._given is not None or not isinstance(value, str) or not value:
      return
    self._texts += 1
    if value.lstrip().startswith("["):
      self._count("[", row)
      return
    for mark in _SEPARATORS:
      if mark in value:
        self._count(mark, row)

  def decide(self, place: Callable[[int], str]) -> str:
    """Decides how texts are read, and returns it in words; "" if no cell is a text.

    Args:
      place: Returns the place of a row, for messages.

    Raises:
      CellError: Cells have several separators, or some are JSON lists and others are not.
    """
    if self._given is not None:
      return f"separated by {_quoted(self._given)}" if self._given else "one in each row"
    if not self._texts:
      return ""
    if len(self._seen) > 1:
      found = " and ".join(
        f"{_quoted(mark)} ({count:,} rows, first {place(first)})" for mark, (count, first) in self._seen.items()
      )
      raise CellError(f"cells have {found}; say with --label_separator what separates labels")
    if not self._seen:
      return "one in each row"
    ((mark, (count, first)),) = self._seen.items()
    if mark != "[":
      self._separator = mark
      return f"separated by {_quoted(mark)}, which {count:,} of {self._texts:,} rows have"
    if count < self._texts:
      raise CellError(
        f"{count:,} of {self._texts:,} cells look like JSON lists (first {place(first)}); write all so, or "
        "say with --label_separator what separates labels"
      )
    self._is_json = True
    return "a JSON list in each row"

  def names(self, value: Any) -> list[str]:
    """Returns the names of the labels of a row, at least one.

    Raises:
      CellError: There is none, or a name is empty or not a text or whole number.
    """
    names = [_label_name(item) for item in self._items(value)]
    if not names:
      raise CellError("has no labels; give the row at least one, or remove it")
    return names

  def numbers(self, value: Any, count: int) -> list[float]:
    """Returns a number for each of the labels of a row, which may be a list, a JSON list or a text like that of labels.

    Raises:
      CellError: There are more or fewer than `count`, or one is not a finite number.
    """
    items = [value] if isinstance(value, int | float) and not isinstance(value, bool) else self._items(value)
    try:
      numbers = [math.nan if isinstance(item, bool) else float(item) for item in items]
    except (TypeError, ValueError, OverflowError):
      numbers = [math.nan]
    if not all(abs(number) <= _LARGEST for number in numbers):  # NaN is not, either.
      raise CellError(f"must have numbers that are finite in float32, not {_excerpt(value)}; correct it")
    if len(numbers) != count:
      raise CellError(f"has {len(numbers)} numbers for {count} labels; give one for each label")
    return numbers

  def _items(self, value: Any) -> Sequence[Any]:
    if is_absent(value):
      return []
    if isinstance(value, list | tuple):
      return value
    if not isinstance(value, str):
      return [value]
    if self._is_json:
      return _json_list(value)
    if not value.strip():
      return []
    return value.split(self._separator) if self._separator else [value]

  def _count(self, mark: str, row: int) -> None:
    count, first = self._seen.get(mark, (0, row))
    self._seen[mark] = count + 1, first


def images_of(value: Any, folder: Path) -> list[tuple[bytes, Path | None]]:
  """Returns the encoded images of a row, and the file of each; None for an image that is in the table.

  Args:
    value: A path, bytes, a dict with `bytes` or `path` as Hugging Face has them, a list of these, or a text with
      several paths: a JSON list, or separated by semicolons. None and "" stand for no image.
    folder: Folder where relative paths start.

  Raises:
    CellError: An image is a URL, is missing, or is not an image.
  """
  if is_absent(value):
    return []
  if isinstance(value, str):
    if value.lstrip().startswith("["):
      value = _json_list(value)
    else:
      value = [part.strip() for part in value.split(";")] if ";" in value else value.strip()
  items = value if isinstance(value, list | tuple) else [value]
  return [_image(item, folder) for item in items if item is not None]


def _image(value: Any, folder: Path) -> tuple[bytes, Path | None]:
  path: Path | None = None
  if isinstance(value, Mapping):
    value = value.get("bytes") or value.get("path")
  if isinstance(value, str):
    if value.startswith(_URLS):
      raise CellError(
        "is a URL; download the images with img2dataset (docs/data.md) and use its table, or name no images "
        "with --image_column="
      )
    path = folder / value
    try:
      value = path.read_bytes()
    except (OSError, ValueError) as error:
      reason = error.strerror if isinstance(error, OSError) else error
      raise CellError(f"image {path} cannot be read ({reason}); correct the path") from error
  if not isinstance(value, bytes) or not is_encoded_image(value):
    what = path or (f"{len(value):,} bytes" if isinstance(value, bytes) else _kind(value))
    raise CellError(f"{what}: is not a PNG, JPEG, WebP, GIF or BMP image; replace or remove it")
  return value, path


def _json_list(text: str) -> list[Any]:
  try:
    items = JSON.decode(text)
  except (ValueError, RecursionError) as error:
    raise CellError(f"is not a JSON list ({json_fault(error)}); {_JSON_ADVICE}") from error
  if not isinstance(items, list):
    raise CellError(f"must be a JSON list; {_JSON_ADVICE}")
  return items


def _label_name(item: Any) -> str:
  if isinstance(item, int) and not isinstance(item, bool):
    return str(item)
  if not isinstance(item, str):
    raise CellError(f"names of labels must be texts or whole numbers, not {_kind(item)}; convert the column")
  name = item.strip()
  if not name:
    raise CellError("has an empty name of a label; remove it")
  _check_characters(name)
  return name


def _check_characters(text: str) -> None:
  if "\0" in text:
    raise CellError("has a NUL character; is the file in UTF-16? Convert it, or remove the character")
  if not text.isascii():
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise CellError("has half a surrogate pair, which no file can store; remove it") from error


def _excerpt(value: Any) -> str:
  try:
    return f"{value!r:.40}"
  except ValueError:  # An integer with thousands of digits.
    return "an integer with thousands of digits"


def _quoted(mark: str) -> str:
  return _NAMES.get(mark, f"'{mark}'")


def _kind(value: Any) -> str:
  return "null" if value is None else type(value).__name__
