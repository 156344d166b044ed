"""The error of a request that is not answered: an HTTP status, a message and the field that is wrong."""

import json

from vixml_jax.serving import schema

_MAX_SHOWN = 80  # Characters.
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 503: {"Retry-After": "1"}}
_OPENAI_CODES = {401: "invalid_api_key", 404: "model_not_found"}


class RequestError(Exception):
  """Raised for a request that gets an HTTP error.

  Attributes:
    status: 4xx: change the request. 503: retry later.
    message: What is wrong and what to do, in one line.
    field: The field that is wrong, such as `queries[3].images[0]`; None if no field is.
  """

  def __init__(self, status: int, message: str, field: str | None = None):
    super().__init__(message)
    self.status, self.message, self.field = status, message, field

  @property
  def headers(self) -> dict[str, str]:
    """Headers of the response."""
    return _HEADERS.get(self.status, {})

  @property
  def body(self) -> bytes:
    """JSON of the response."""
    return schema.Failure(error=schema.Error(field=self.field, message=self.message)).model_dump_json().encode()

  @property
  def openai_body(self) -> bytes:
    """JSON of the response in the form of OpenAI's API."""
    error = {
      "message": self.message,
      "type": "invalid_request_error" if self.status < 500 else "server_error",
      "param": self.field,
      "code": _OPENAI_CODES.get(self.status),
    }
    return json.dumps({"error": error}).encode()


def shortened(text: str) -> str:
  """Returns the start of a text that a client sent, for an error message."""
  return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
