"""Responses to requests that fail, in the form of the API or in that of OpenAI's."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vixml_jax.errors import InputError
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.request_record import RequestRecord

OPENAI_PATHS = ("/v1/embeddings", "/v1/models")
"""Paths whose errors have OpenAI's form."""
_LINGER_SECONDS = 5.0


def failure(error: Exception, path: str) -> Response:
  """Returns the response to a request that failed.

  Args:
    error: What was raised; an unknown exception becomes status 500 without details.
    path: Path of the request.
  """
  if isinstance(error, HTTPException):
    response = failure(RequestError(error.status_code, str(error.detail)), path)
    response.headers.update(error.headers or {})
    return response
  if isinstance(error, InputError):
    error = RequestError(422, str(error))
  elif not isinstance(error, RequestError):
    error = RequestError(500, "the server failed on this request; see its log")
  make = _EarlyResponse if error.status == 413 else Response
  is_openai = path.startswith(OPENAI_PATHS)
  status = 400 if is_openai and error.status == 422 else error.status
  body = error.openai_body if is_openai else error.body
  return make(body, status, error.headers, media_type="application/json")


class _EarlyResponse(Response):
  """A response that may be sent before the request's body has arrived, and then reads the rest of the body.

  A client that sends its whole body before it reads would otherwise not see the response.
  """

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if RequestRecord.of(scope).has_body:
      await super().__call__(scope, receive, send)
      return
    self.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
    await send({"type": "http.response.body", "body": self.body, "more_body": True})
    if not any(name == b"expect" for name, _ in scope["headers"]):  # A client that waits for permission sends no body.
      try:
        async with asyncio.timeout(_LINGER_SECONDS):
          while (await receive()).get("more_body"):
            pass
      except TimeoutError:
        pass
    await send({"type": "http.response.body"})
