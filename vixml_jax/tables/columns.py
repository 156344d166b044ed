"""Finds which columns of a table have texts, labels, uids and images, by flags, names or contents."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from vixml_jax.errors import InputError, listed
from vixml_jax.tables.cells import is_absent
from vixml_jax.tables.parts import Part

FLAGS = {
  "text": "--text_column",
  "labels": "--label_column",
  "content": "--content_column",
  "uid": "--uid_column",
  "relevance": "--relevance_column",
  "images": "--image_column",
  "split": "--split_column",
}
"""The flag that names the column of each role."""

# Names of columns in small letters. A column of a role must have one of its kinds.
_NAMES = {
  "text": ("text", "title", "name", "query", "sentence", "caption", "product", "product_name", "item", "document"),
  "labels": (
    *("labels", "label", "tags", "tag", "categories", "category", "classes", "class", "topics", "topic", "targets"),
    *("target", "keywords", "label_names", "label_name", "label_text"),
  ),
  "content": ("content", "description", "body", "abstract", "details"),
  "uid": ("uid", "id", "_id", "item_id", "product_id", "asin", "sku"),
  "relevance": ("relevance", "relevances"),
  "images": (
    *("images", "image", "image_path", "image_paths", "image_file", "image_files", "img", "photo", "photos"),
    *("picture", "pictures", "jpg", "jpeg", "png", "webp"),
  ),
  "split": ("split",),
}
_KINDS = {
  "text": ("text",),
  "labels": ("text", "list", "whole number"),
  "content": ("text",),
  "uid": ("text", "whole number"),
  "relevance": ("text", "list", "whole number", "number"),
  "images": ("text", "list", "image"),
  "split": ("text",),
}
_ALL_NAMES = frozenset(name for names in _NAMES.values() for name in names)
_SAMPLED_ROWS = 100


@dataclasses.dataclass(frozen=True)
class Columns:
  """The column of each role. None lets the names and contents decide; "" says that there is no such column.

  Attributes:
    text: Text of an item (its title).
    labels: Names of its labels: a list, a JSON list, or one text with a separator.
    content: More text of it, such as a description.
    uid: Its uid.
    relevance: A number for each of its labels.
    images: Its images: a path or bytes, or a list of them.
    split: Whether it is for training or for testing.
  """

  text: str | None = None
  labels: str | None = None
  content: str | None = None
  uid: str | None = None
  relevance: str | None = None
  images: str | None = None
  split: str | None = None

  def chosen(self) -> list[str]:
    """Returns the names of the columns that are read."""
    return [name for name in dataclasses.astuple(self) if name]


def find_columns(
  given: Columns, parts: Sequence[Part], roles: Iterable[str] = tuple(FLAGS)
) -> tuple[Columns, dict[str, str]]:
  """Finds the column of each role.

  Args:
    given: What the user said.
    parts: The parts of the table. All must have the columns that are found.
    roles: The roles to look for; the others get no column.

  Returns:
    The columns, where "" stands for none. For each role with a column, or with several that are possible, a short text
    that says which and why, such as "column 'name'".

  Raises:
    InputError: The table is empty or lacks a named column, or the text or the labels could be in several columns or
      in none.
  """
  part = parts[0]
  kinds = _kinds(part)
  roles = tuple(roles)
  found = {role: name for role, name in dataclasses.asdict(given).items() if name is not None}
  reasons = {role: f"column {name!r}" for role, name in found.items() if name}
  _check_named(found, parts)
  for role in roles:
    if role not in found:
      _find_by_name(role, part, kinds, found, reasons)
  for role, kind in (("labels", "list"), ("text", "text")):
    if role in roles and role not in found:
      _find_by_contents(role, kind, part, kinds, found, reasons)
  columns = Columns(**{role: found.get(role, "") if role in roles else "" for role in FLAGS})
  _check_all_parts(columns, parts)
  return columns, reasons


def _kinds(part: Part) -> dict[str, str]:
  """Returns the kind of each column by its first values: text, list, image, whole number, number, empty or other."""
  batch = next(part.batches(part.columns, _SAMPLED_ROWS), None)
  if batch is None or not len(next(iter(batch.columns.values()), ())):
    raise InputError(f"{part.name}: has no rows; add at least one")
  return {name: _kind_of(values) for name, values in batch.columns.items()}


def _kind_of(values: Sequence[Any]) -> str:
  kinds = {_kind(value) for value in values if not is_absent(value)}
  return kinds.pop() if len(kinds) == 1 else "other" if kinds else "empty"


def _kind(value: Any) -> str:
  if isinstance(value, str):
    return "text"
  if isinstance(value, list | tuple):
    return "list"
  if isinstance(value, bytes) or (isinstance(value, Mapping) and {"bytes", "path"} >= set(value)):
    return "image"
  if isinstance(value, bool):
    return "other"
  return "whole number" if isinstance(value, int) else "number" if isinstance(value, float) else "other"


def _check_named(found: dict[str, str], parts: Sequence[Part]) -> None:
  for role, name in found.items():
    for part in parts:
      if name and name not in part.columns:
        raise InputError(f"{part.name}: has no column {name!r} ({FLAGS[role]}); columns: {listed(part.columns)}")
    twice = [other for other, its in found.items() if name and its == name and other != role]
    if twice:
      raise InputError(f"{FLAGS[role]} and {FLAGS[twice[0]]}: both name column {name!r}; name different columns")
  for role in ("text", "labels"):
    if found.get(role) == "":
      raise InputError(f"{FLAGS[role]}: must name a column; columns: {listed(parts[0].columns)}")


def _find_by_name(role: str, part: Part, kinds: dict[str, str], found: dict[str, str], reasons: dict[str, str]) -> None:
  taken = set(found.values())
  fitting = [
    name
    for name in part.columns
    if name.strip().lower() in _NAMES[role] and name not in taken and kinds[name] in (*_KINDS[role], "empty")
  ]
  if len(fitting) == 1:
    found[role], reasons[role] = fitting[0], f"column {fitting[0]!r}"
  elif fitting and role in ("text", "labels"):
    raise InputError(f"{part.name}: {role} could be {listed(fitting, ' or ')}; name one with {FLAGS[role]}")
  elif fitting:
    reasons[role] = f"none; {listed(fitting)} are possible: name one with {FLAGS[role]}"


def _find_by_contents(
  role: str, kind: str, part: Part, kinds: dict[str, str], found: dict[str, str], reasons: dict[str, str]
) -> None:
  """Takes the only column of the kind that has no other role, and no name of one."""
  taken = {*found.values(), *(name for name in part.columns if name.strip().lower() in _ALL_NAMES)}
  fitting = [name for name in part.columns if kinds[name] == kind and name not in taken]
  if len(fitting) == 1:
    what = "lists" if kind == "list" else "texts"
    found[role], reasons[role] = fitting[0], f"column {fitting[0]!r}, the only other one with {what}"
    return
  raise InputError(
    f"{part.name}: cannot tell which column has the {role}; name it with {FLAGS[role]}; columns: {listed(part.columns)}"
  )


def _check_all_parts(columns: Columns, parts: Sequence[Part]) -> None:
  for part in parts[1:]:
    for name in columns.chosen():
      if name not in part.columns:
        raise InputError(
          f"{part.name}: has no column {name!r}, which {parts[0].name} has; columns: {listed(part.columns)}"
        )
