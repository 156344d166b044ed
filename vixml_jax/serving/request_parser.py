"""From the bytes of a request to queries that can be answered, or to what is wrong with them."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Iterable, Sequence
import contextlib
from typing import Any

import numpy as np
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from vixml_jax.errors import InputError
from vixml_jax.images.decoding import BadImage, decode
from vixml_jax.inference.predictor import query_format
from vixml_jax.inference.queries import Query, QueryFormat
from vixml_jax.serving.engine import Model, QueryRequest
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.schema import Strict, request_model
from vixml_jax.serving.served_index import ServedIndex

_FILTERS = ("allow", "deny", "categories")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[{,:"))
_MOST_SHOWN = 80  # Characters of a client's own text in an error.


class RequestParser:
  """Reads and checks requests.

  Args:
    limits: what is refused before any work is done.

  Attributes:
    model: the shape of a request's body.
  """

  def __init__(self, limits: Limits):
    self.model = request_model(limits)
    self._limits = limits
    self._held = 0

  @contextlib.asynccontextmanager
  async def body(self, request: Request) -> AsyncIterator[bytes]:
    """The body, which counts among all bodies until the block ends.

    Raises:
      RequestError: 413 for one that is too large, as soon as that is known; 408 for one that comes too slowly; 503
        where too many are held already.
    """
    most = self._limits.body_bytes
    declared = int(request.headers.get("content-length", most))
    if declared > most:
      raise self._too_large()
    if self._held + declared > self._limits.bodies_bytes:
      raise RequestError(503, "too many requests at the same time; send this one again later")
    self._held += declared
    try:
      yield await self._read(request)
    finally:
      self._held -= declared

  async def _read(self, request: Request) -> bytes:
    body = bytearray()
    try:
      async with asyncio.timeout(self._limits.body_seconds):
        async for part in request.stream():
          body += part
          if len(body) > self._limits.body_bytes:
            raise self._too_large()
    except TimeoutError as error:
      raise RequestError(408, f"the body did not come within {self._limits.body_seconds:g} s") from error
    except ClientDisconnect as error:
      raise RequestError(400, "the connection was closed before the body had come") from error
    return bytes(body)

  def _too_large(self) -> RequestError:
    return RequestError(
      413, f"the body has more than {self._limits.body_bytes:,} bytes; send fewer queries, or smaller images"
    )

  def parse(self, body: bytes, model: Model) -> list[QueryRequest]:
    """What a body asks, checked down to the pixels of its images. Takes a while: call it in a thread.

    Raises:
      RequestError: 400 for what is no JSON, 413 for what would unfold to too much, 422 for anything else.
    """
    if len(body.translate(None, _NOT_STRUCTURE)) > self._limits.body_values:
      raise RequestError(413, f"the body has more than {self._limits.body_values:,} values; send fewer queries")
    try:
      request = self.model.model_validate_json(body)
    except ValidationError as error:
      raise _refused(error, self.model) from error
    _check_keys(request, "")
    for i, query in enumerate(request.queries):  # type: ignore[attr-defined]
      _check_keys(query, f"queries[{i}].")
    given = request.model_dump(exclude_none=True)
    k, index = given["k"], model.index
    if k > index.num_live:
      raise RequestError(422, f"must be 1 to {index.num_live}, the number of labels", "k")
    _check_names(given, "", index)
    common = {key: given[key] for key in _FILTERS if key in given}
    wanted = query_format(model.predictor.encoder.config)
    return [
      QueryRequest(_query(query, f"queries[{i}]", common, model, wanted), k) for i, query in enumerate(given["queries"])
    ]


def _query(given: dict[str, Any], where: str, common: dict[str, Any], model: Model, wanted: QueryFormat) -> Query:
  _check_names(given, f"{where}.", model.index)
  if "images" in given:
    given["images"] = [
      _image(image, f"{where}.images[{i}]", model.reads_pictures) for i, image in enumerate(given["images"])
    ]
  if not given["title"].strip() and not given.get("content") and not given.get("images"):
    raise RequestError(422, "is empty; give a title" + (" or an image" if wanted.images else ""), f"{where}.title")
  try:
    return wanted.parse(common | given, where)
  except InputError as error:
    raise RequestError(422, str(error).removeprefix(f"{where}: "), where) from error


def _image(given: str | list[float], where: str, reads_pictures: bool) -> bytes | np.ndarray:
  """An encoded image that has pixels, or a feature vector; a text of a client is never taken for a path."""
  if isinstance(given, list):
    return np.asarray(given, np.float32)
  if not reads_pictures:
    raise RequestError(422, "this server reads no pictures; leave them out", where)
  try:
    content = base64.b64decode(given.partition(",")[2] if given.startswith("data:") else given, validate=True)
  except (ValueError, binascii.Error) as error:
    raise RequestError(422, "is not base64", where) from error
  try:
    decode(content)
  except BadImage as error:
    raise RequestError(422, str(error), where) from error
  return content


def _check_keys(given: Strict, prefix: str) -> None:
  for key in given.model_extra or ():
    known = ", ".join(type(given).model_fields)
    raise RequestError(422, f"is not known; known are {known}", f"{prefix}{key[:_MOST_SHOWN]}")


def _check_names(given: dict[str, Any], prefix: str, index: ServedIndex) -> None:
  """Refuses names that the index does not know, naming the first."""
  for i, name in enumerate(given.get("categories", ())):
    if name not in index.category_names:
      raise RequestError(422, f"there is no category {_shown(name)}", f"{prefix}categories[{i}]")
  for key in ("allow", "deny"):
    uids = given.get(key, ())
    if not _known(uids, index):
      i = next(i for i, uid in enumerate(uids) if not _known([uid], index))
      raise RequestError(422, f"there is no label {_shown(uids[i])}", f"{prefix}{key}[{i}]")


def _known(uids: Sequence[str], index: ServedIndex) -> bool:
  try:
    index.filters(deny=[uids])
  except InputError:
    return False
  return True


def _shown(text: str) -> str:
  return repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "...")


def _refused(error: ValidationError, model: type[Strict]) -> RequestError:
  """What is wrong deepest within the body; where a value may be of two types, what each of them asks for."""
  problems = error.errors(include_url=False, include_context=False, include_input=False)
  if problems[0]["type"] == "json_invalid":
    return RequestError(400, f"the body is not JSON in UTF-8: {problems[0]['msg']}")
  field = _field(max(problems, key=lambda problem: len(problem["loc"]))["loc"])
  messages = dict.fromkeys(problem["msg"] for problem in problems if _field(problem["loc"]) == field)
  return RequestError(422, "; or ".join(messages), field)


def _field(location: Iterable[int | str]) -> str:
  """`queries[0].title` of ("queries", 0, "title"), without the names of types that a value may have."""
  parts = []
  for i, part in enumerate(location):
    if isinstance(part, int):
      parts.append(f"[{part}]")
    elif part.isidentifier() and part not in ("str", "int", "float"):
      parts.append(f".{part[:_MOST_SHOWN]}" if i else part[:_MOST_SHOWN])
  return "".join(parts)
