"""Files for `add_labels`: new labels, uids of labels to delete, and categories of labels; read and checked."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, cast

from ml_collections import ConfigDict

from vixml_jax.errors import InputError, listed
from vixml_jax.inference.queries import Query, QueryFormat, query_format
from vixml_jax.inference.query_files import open_queries
from vixml_jax.record_files import json_lines

KEYS = ("uid", "title", "content", "images", "categories", "positives")
"""Keys of a new label."""
POSITIVE_KEYS = ("uid", "title", "content", "images")
"""Keys of a query that is given as a positive of a new label."""

_LINES_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class NewLabel(Query):
  """A new label whose values have been checked: text and images like a query, and the categories that it is in.

  Attributes:
    uid: Name by which users refer to the label.
    positives: Queries that have the label.
  """

  uid: str = ""
  positives: tuple[Query, ...] = ()


class LabelFormat(QueryFormat):
  """The form of labels that a model takes; its attributes are those of `QueryFormat`."""

  def parse(self, given: str | Mapping[str, Any], where: str, root: Path | None = None) -> NewLabel:
    """Checks a label and returns it.

    Args:
      given: A dict with `KEYS`. A key with the value None counts as absent. Each positive is a text, or a dict with
        `POSITIVE_KEYS`.
      where: Name of the label in error messages.
      root: Folder of relative paths of images; None for the current one.

    Raises:
      InputError: A value is wrong; the message names `where`, the key and what the value must be.
    """
    if not isinstance(given, Mapping):
      raise InputError(f"{where}: must be an object with 'uid' and {self.required!r}, not {type(given).__name__}")
    _check_known(given, KEYS, where)
    for key in ("uid", self.required):
      if given.get(key) is None:
        raise InputError(f"{where}: has no {key!r}; every label needs one")
    item = QueryFormat.parse(self, {key: given[key] for key in given if key != "positives"}, where, root)
    if not given[self.required].strip():
      raise InputError(f"{where}: {self.required!r} is empty; every label needs a text")
    return NewLabel(
      **vars(item) | {"uid": _checked_uid(str(given["uid"]), where)},
      positives=self._positives(given.get("positives"), where, root),
    )

  def _positives(self, given: Any, where: str, root: Path | None) -> tuple[Query, ...]:
    if given is None:
      return ()
    if not isinstance(given, list | tuple):
      raise InputError(f"{where}: 'positives' must be a list of queries, not {type(given).__name__}")
    queries = []
    for number, positive in enumerate(given):
      place = f"{where}: positive {number}"
      if isinstance(positive, Mapping):
        _check_known(positive, POSITIVE_KEYS, place)
      queries.append(QueryFormat.parse(self, positive, place, root))
      if not queries[-1].text.strip():
        raise InputError(f"{place}: has no text; leave it out")
    return tuple(queries)


class LabelCategories(NamedTuple):
  """Categories that are given to a label.

  Attributes:
    where: File and line of the label.
    names: Names of the categories.
  """

  where: str
  names: tuple[str, ...]


def label_format(config: ConfigDict) -> LabelFormat:
  """Returns the form of labels that the model of a config takes."""
  return LabelFormat(**vars(query_format(config)))


def read_labels(path: Path, form: LabelFormat) -> list[NewLabel]:
  """Reads new labels from a file with an object per line; blank lines are ignored.

  Args:
    path: `.jsonl` file. Relative paths of images start at its folder.
    form: Form of labels that the model takes.

  Raises:
    InputError: The file or a line is wrong; the message names the line.
  """
  if path.suffix != ".jsonl":
    raise InputError(f"{path}: files of labels end in .jsonl and have an object per line; convert or rename it")
  if not path.is_file():
    raise InputError(f"{path}: no such file; --labels must name one")
  blocks = open_queries(path, form).blocks(_LINES_AT_ONCE, lambda number: True)
  labels = [label for _, block in blocks for label in block]
  if not labels:
    raise InputError(f"{path}: has no labels; add at least one")
  return cast(list[NewLabel], labels)  # `LabelFormat.parse` returns these.


def read_uids(path: Path) -> dict[str, str]:
  """Reads uids from a file with one per line, and returns the last line of each; blank lines are ignored.

  Raises:
    InputError: The file cannot be read, or has no uids.
  """
  try:
    lines = [line.removesuffix("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: cannot be read ({error}); --delete must name a text file with a uid per line") from error
  uids = {line: f"{path}:{number}" for number, line in enumerate(lines, 1) if line.strip()}
  if not uids:
    raise InputError(f"{path}: has no uids; add at least one")
  return uids


def read_categories(path: Path) -> dict[str, LabelCategories]:
  """Reads the categories of labels, by uid; blank lines are ignored.

  Args:
    path: `.jsonl` file, each line with `uid` and `categories`, a list of names.

  Raises:
    InputError: The file or a line is wrong; the message names the line.
  """
  found: dict[str, LabelCategories] = {}
  for where, given in ((f"{path}:{number}", given) for number, given in json_lines(path)):
    uid, names = _uid_and_categories(given, where)
    if uid in found:
      raise InputError(f"{where}: uid {uid!r} is also in {found[uid].where}; give all its categories in one line")
    found[uid] = LabelCategories(where, names)
  if not found:
    raise InputError(f"{path}: has no uids; add at least one")
  return found


def _uid_and_categories(given: Any, where: str) -> tuple[str, tuple[str, ...]]:
  if not isinstance(given, dict) or set(given) != {"uid", "categories"} or not isinstance(given["uid"], str):
    raise InputError(f"{where}: must be an object with 'uid', a text, and 'categories', a list of names")
  names = given["categories"]
  if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
    raise InputError(f"{where}: 'categories' must be a list of names")
  return _checked_uid(given["uid"], where), tuple(dict.fromkeys(names))


def _check_known(given: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
  unknown = [key for key in given if key not in keys]
  if unknown:
    raise InputError(f"{where}: unknown {listed(unknown)}; known are {', '.join(keys)}")


def _checked_uid(uid: str, where: str) -> str:
  try:
    uid.encode()
  except UnicodeEncodeError as error:
    raise InputError(f"{where}: 'uid' has half a surrogate pair, which no file can store; use another uid") from error
  if not uid.strip():
    raise InputError(f"{where}: 'uid' is empty; every label needs one")
  return uid
