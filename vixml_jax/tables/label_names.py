"""The labels of a table: those of a table of labels, or the names that its rows have, in the order of appearance."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from vixml_jax.errors import InputError, listed
from vixml_jax.tables.cells import CellError, text_of, uid_of
from vixml_jax.tables.columns import Columns, find_columns
from vixml_jax.tables.parts import Part, RowBatch
from vixml_jax.tables.reading import ROWS_AT_ONCE, checked, place_of_row
from vixml_jax.tables.sources import SourcePart

_IMAGES_AT_ONCE = 256
_UID_NAMES = ("uid", "id", "name", "label")
_TEXT_NAMES = ("text", "title", "name", "label")


class LabelRow(NamedTuple):
  """A label to write.

  Attributes:
    uid: Its uid.
    title: Its text.
    content: More text.
    batch: Rows of the table of labels that it is in; None without such a table.
    row: Its row in the batch.
    part: Part of the table of labels.
  """

  uid: str
  title: str
  content: str
  batch: RowBatch | None = None
  row: int = 0
  part: Part | None = None


class Labels(Protocol):
  """Labels and their ids.

  Attributes:
    ids: Id of each uid.
    images: Column of images; "" without one.
  """

  ids: dict[str, int]
  images: str

  def find(self, names: list[str]) -> list[int]:
    """Returns the ids of names; raises `CellError` for a name that is no label."""

  def rows(self) -> Iterator[LabelRow]:
    """Yields all labels by id."""


class LabelNames:
  """Labels without a table: a name is the uid and the text of its label, and a new name becomes the next label."""

  def __init__(self) -> None:
    self.ids: dict[str, int] = {}
    self.images = ""

  def find(self, names: list[str]) -> list[int]:
    """Returns the ids of names; a new one gets the next id."""
    return [self.ids.setdefault(name, len(self.ids)) for name in names]

  def rows(self) -> Iterator[LabelRow]:
    """Yields all labels by id."""
    return (LabelRow(name, name, "") for name in self.ids)


class LabelTable:
  """A table of labels, whose order is that of their ids.

  Attributes:
    columns: The columns that were found. `uid` is the one that rows refer to.
    reasons: The columns in words, by role.
  """

  def __init__(self, sources: list[SourcePart]):
    """Reads the uids and texts, and checks them.

    Raises:
      InputError: A row cannot be used, or two have the same uid.
    """
    self._parts = [source.part for source in sources]
    uid, text = (_first(candidates, self._parts[0]) for candidates in (_UID_NAMES, _TEXT_NAMES))
    given = Columns(text=text, uid=uid if uid != text else "")
    found, self.reasons = find_columns(given, self._parts, ("text", "content", "uid", "images"))
    self.columns, self.images = found, found.images or ""
    self._uid = uid
    self.ids: dict[str, int] = {}
    self._read()

  def find(self, names: list[str]) -> list[int]:
    """Returns the ids of names; raises `CellError` for a name that is not in the table."""
    try:
      return [self.ids[name] for name in names]
    except KeyError as error:
      raise CellError(
        f"label {error.args[0]!r:.60} is in no row of column {self._uid!r} of {self._parts[0].name}; add it there, or "
        "correct the name"
      ) from None

  def rows(self) -> Iterator[LabelRow]:
    """Yields all labels by id, and reads the table again for it."""
    names = list(dict.fromkeys([self._uid, *self.columns.chosen()]))
    for part in self._parts:
      for batch in part.batches(names, _IMAGES_AT_ONCE):
        uids, titles = checked(batch, self._uid, uid_of), checked(batch, self.columns.text, text_of)
        contents = checked(batch, self.columns.content, optional_text) if self.columns.content else [""] * len(uids)
        for row, (uid, title, content) in enumerate(zip(uids, titles, contents, strict=True)):
          yield LabelRow(uid, title, content, batch, row, part)

  def _read(self) -> None:
    for part in self._parts:
      for batch in part.batches([self._uid, self.columns.text or ""], ROWS_AT_ONCE):
        checked(batch, self.columns.text, text_of)
        for row, uid in enumerate(checked(batch, self._uid, uid_of)):
          if uid in self.ids:
            first = place_of_row(self._parts, self._uid, self.ids[uid])
            raise InputError(f"{batch.where(row)}, column {self._uid!r}: {uid!r:.60} is also in {first}; keep one")
          self.ids[uid] = len(self.ids)


def optional_text(value: Any) -> str:
  """Returns a text that may be empty; see `text_of`."""
  return text_of(value, may_be_empty=True)


def _first(candidates: tuple[str, ...], part: Part) -> str:
  by_name = {name.lower(): name for name in reversed(part.columns)}
  found = next((by_name[name] for name in candidates if name in by_name), None)
  if found is None:
    raise InputError(
      f"{part.name}: a table of labels has a column {', '.join(candidates[:-1])} or {candidates[-1]}; columns: "
      f"{listed(part.columns)}"
    )
  return found
