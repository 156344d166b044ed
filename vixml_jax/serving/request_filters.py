"""Filters of requests: names are resolved once per request, and the filters of a batch are joined from its requests."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged, offsets_of
from vixml_jax.search.filters import Filters, IdSets
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.serving.request_error import RequestError, shortened

KEYS = ("allow", "deny", "categories")
"""Keys of filters, in a request and in its queries."""


def resolve_filters(request: Mapping[str, Any], labels: LabelIndex) -> Filters | None:
  """Returns the filters of a request's queries as ids; None if there are none.

  Args:
    request: A request with a valid form. A filter of a query replaces that of the request.
    labels: The label index.

  Raises:
    RequestError: A name is unknown; the error names the first one.
  """
  common = {key: request[key] for key in KEYS if key in request}
  # The request itself comes first, so that its names are checked even if every query replaces them.
  rows = [common, *(common | query for query in request["queries"])]
  if not any(key in row for row in rows for key in KEYS):
    return None
  try:
    filters = labels.filters(**{key: [row.get(key) for row in rows] for key in KEYS})
  except InputError as error:
    raise _unknown_name(request, labels) or RequestError(422, str(error)) from error
  return filters.take(np.arange(1, len(rows)))


def join_filters(parts: Sequence[tuple[Filters | None, int]]) -> Filters | None:
  """Returns the filters of a batch of queries; None if no query has one.

  Args:
    parts: For each query the filters of its request and its position in the request.
  """
  allow, deny = (
    _join_sets([(None if filters is None else getattr(filters, name), row) for filters, row in parts])
    for name in ("allow", "deny")
  )
  return None if allow is None and deny is None else Filters(allow, deny)


def _join_sets(parts: Sequence[tuple[IdSets | None, int]]) -> IdSets | None:
  """Returns the sets of the given queries. Sets that queries of a request share stay shared."""
  distinct = list({id(sets): sets for sets, _ in parts if sets is not None}.values())
  if not distinct:
    return None
  first = dict(zip(map(id, distinct), offsets_of([len(each.sets) for each in distinct]), strict=False))
  set_of_query = [
    -1 if sets is None or not sets.has_set[row] else first[id(sets)] + sets.set_of_query[row] for sets, row in parts
  ]
  values = np.concatenate([each.sets.values for each in distinct])
  lengths = np.concatenate([each.sets.lengths for each in distinct])
  return IdSets(Ragged.of_lengths(values, lengths), np.asarray(set_of_query, np.int32))


def _unknown_name(request: Mapping[str, Any], labels: LabelIndex) -> RequestError | None:
  """Returns the error of the first name that the index does not know."""
  places = {"": request} | {f"queries[{i}].": query for i, query in enumerate(request["queries"])}
  for prefix, given in places.items():
    for i, name in enumerate(given.get("categories", ())):
      if name not in labels.categories:
        return RequestError(422, f"there is no category {shortened(name)!r}", f"{prefix}categories[{i}]")
    for key in ("allow", "deny"):
      for i, uid in enumerate(given.get(key, ())):
        if not _is_known(uid, labels):
          return RequestError(422, f"there is no label {shortened(uid)!r}", f"{prefix}{key}[{i}]")
  return None


def _is_known(uid: str, labels: LabelIndex) -> bool:
  try:
    labels.filters(deny=[[uid]])
  except InputError:
    return False
  return True
