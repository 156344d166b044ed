"""Turns the bytes of a request into checked queries, or into an error that names the field that is wrong."""

import asyncio
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from vixml_jax.errors import InputError
from vixml_jax.inference.queries import Query, QueryFormat
from vixml_jax.inference.query_images import QueryImageEncoder
from vixml_jax.inference.rankings import BLEND
from vixml_jax.serving import request_filters
from vixml_jax.serving.budgets import Share
from vixml_jax.serving.engine import QueryRequest, ServedModel
from vixml_jax.serving.explanations import Detail
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.request_error import RequestError, shortened
from vixml_jax.serving.request_images import read_image
from vixml_jax.serving.request_record import RequestRecord
from vixml_jax.serving.schema import Strict, request_model

_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[{,:"))
_DIAL = ("tail", "min_probability")
_QUICK_BYTES = 4_096
# Keys whose values take time, and the escape that can spell them in another way.
_SLOW = (b"images", *(key.encode() for key in request_filters.KEYS), b"\\u")


def is_quick(body: bytes) -> bool:
  """Returns whether `RequestParser.parse` takes less time than passing the body to another thread."""
  return len(body) <= _QUICK_BYTES and not any(part in body for part in _SLOW)


def check_values(body: bytes, limits: Limits) -> None:
  """Checks the number of values of a body before it is parsed.

  Raises:
    RequestError: 413 if there are too many.
  """
  if len(body.translate(None, _NOT_STRUCTURE)) > limits.body_values:
    raise RequestError(413, f"the body has more than {limits.body_values:,} values; send fewer queries")


class RequestParser:
  """Reads and checks requests.

  Attributes:
    model: Pydantic model of a request's body.
  """

  def __init__(self, limits: Limits):
    """Takes the limits that are checked before any work is done."""
    self.model = request_model(limits)
    self._limits = limits

  async def body(self, request: Request) -> bytes:
    """Returns the body. Its bytes count for the share of the request as they arrive.

    Raises:
      RequestError: 413 if the body is too large, as soon as that is known; 408 if it arrives too slowly; 503 if there
        is no room for it.
    """
    if int(request.headers.get("content-length", 0)) > self._limits.body_bytes:
      raise self._too_large()
    return await self._read(request)

  async def _read(self, request: Request) -> bytes:
    body, share, record = bytearray(), Share.of(request.scope), RequestRecord.of(request.scope)
    try:
      async with asyncio.timeout(self._limits.body_seconds):
        while not record.has_body:
          message = await request.receive()
          if message["type"] == "http.disconnect":
            raise RequestError(400, "the connection was closed before the body had arrived; send it again")
          body += message.get("body", b"")
          record.has_body = not message.get("more_body", False)
          if len(body) > self._limits.body_bytes:
            raise self._too_large()
          if not share.resize(len(body)):
            raise RequestError(503, "too many requests at the same time; send this one again later")
    except TimeoutError as error:
      raise RequestError(
        408, f"the body did not arrive within {self._limits.body_seconds:g} s; send it again"
      ) from error
    return bytes(body)

  def _too_large(self) -> RequestError:
    return RequestError(
      413, f"the body has more than {self._limits.body_bytes:,} bytes; send fewer queries, or smaller images"
    )

  def parse(self, body: bytes, model: ServedModel) -> list[QueryRequest]:
    """Returns the queries of a body, with filters resolved and the sizes of images checked. No image is decoded.

    This takes a while, so it should be called in a thread unless `is_quick`.

    Raises:
      RequestError: 400 if the body is not JSON, 413 if it has too many values, 422 if anything else is wrong.
    """
    check_values(body, self._limits)
    try:
      request = self.model.model_validate_json(body)
    except ValidationError as error:
      raise _request_error(error) from error
    _check_keys(request, "")
    for i, query in enumerate(request.queries):  # type: ignore[attr-defined]
      _check_keys(query, f"queries[{i}].")
    given = request.model_dump(exclude_none=True)
    k = min(given["k"], model.index.num_live)
    settings = _settings(given, model)
    filters = request_filters.resolve_filters(given, model.labels)
    encoder = model.predictor.image_encoder if model.reads_images else None
    queries, left = list[tuple[Query, int]](), self._limits.pixels
    for i, query in enumerate(given["queries"]):
      queries.append(_query(query, f"queries[{i}]", model.form, encoder, left))
      left -= queries[-1][1]
    tokens = model.predictor.encoder.tokenizer([query.text for query, _ in queries])
    return [
      QueryRequest(query, tokens[i], k, filters, i, pixels=pixels, **settings)
      for i, (query, pixels) in enumerate(queries)
    ]


def _settings(given: dict[str, Any], model: ServedModel) -> dict[str, Any]:
  """Returns the ranking of a request, whether to explain it, and the dial if it has one."""
  rankings = model.rankings
  if given["explain"] and not model.explains:
    reason = "does not explain answers" if model.detail == Detail.NONE else "has no training queries at hand"
    raise RequestError(422, f"this server {reason}; send the request without explain", "explain")
  offered, ranking = ", ".join(rankings.predictors), given.get("ranking", rankings.default.name)
  if ranking not in rankings.predictors:
    raise RequestError(422, f"this server does not offer {ranking}; it offers {offered}", "ranking")
  dial = {name: given[name] for name in _DIAL if name in given}
  if dial and ranking != BLEND:
    advice = "set ranking to blend" if BLEND in rankings.predictors else f"this server offers {offered}"
    raise RequestError(422, f"only the ranking blend has it, and the ranking is {ranking}; {advice}", next(iter(dial)))
  return {"ranking": ranking, "explain": given["explain"], **dial}


def _query(
  given: dict[str, Any], where: str, form: QueryFormat, encoder: QueryImageEncoder | None, pixels: int
) -> tuple[Query, int]:
  """Returns a query without its filters, with no more images than the model uses, and the pixels of these images.

  Further images are not looked at.
  """
  values, taken = {key: value for key, value in given.items() if key not in request_filters.KEYS}, 0
  if "images" in values:
    values["images"], images = [], values["images"][: form.images]
    for i, image in enumerate(images):
      read, count = read_image(image, f"{where}.images[{i}]", encoder, pixels - taken)
      values["images"].append(read)
      taken += count
  if not values["title"].strip() and not values.get("content") and not values.get("images"):
    raise RequestError(422, "is empty; give a title" + (" or an image" if form.images else ""), f"{where}.title")
  try:
    return form.parse(values, where), taken
  except InputError as error:
    raise RequestError(422, str(error).removeprefix(f"{where}: "), where) from error


def _check_keys(given: Strict, prefix: str) -> None:
  for key in given.model_extra or ():
    known = ", ".join(type(given).model_fields)
    raise RequestError(422, f"is not known; known are {known}", f"{prefix}{shortened(key)}")


def _request_error(error: ValidationError) -> RequestError:
  """Returns the most deeply nested error. For a value that may have one of two types, it has the messages of both."""
  problems = error.errors(include_url=False, include_context=False, include_input=False)
  if problems[0]["type"] == "json_invalid":
    return RequestError(400, f"the body is not JSON in UTF-8: {problems[0]['msg']}")
  field = _field(max(problems, key=lambda problem: len(problem["loc"]))["loc"])
  messages = dict.fromkeys(problem["msg"] for problem in problems if _field(problem["loc"]) == field)
  return RequestError(422, "; or ".join(messages), field)


def _field(location: Iterable[int | str]) -> str:
  """Returns `queries[0].title` for ("queries", 0, "title"), without the names of types that a value may have."""
  parts = []
  for i, part in enumerate(location):
    if isinstance(part, int):
      parts.append(f"[{part}]")
    elif part.isidentifier() and part not in ("str", "int", "float"):
      parts.append(f".{shortened(part)}" if i else shortened(part))
  return "".join(parts)
