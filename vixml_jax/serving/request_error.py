"""The error of a request that is not answered: an HTTP status, a message and the field that is wrong."""

from vixml_jax.serving import schema

_MAX_SHOWN = 80  # Characters.


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
    return {"Retry-After": "1"} if self.status == 503 else {}

  @property
  def body(self) -> bytes:
    """JSON of the response."""
    return schema.Failure(error=schema.Error(field=self.field, message=self.message)).model_dump_json().encode()


def shortened(text: str) -> str:
  """Returns the start of a text that a client sent, for an error message."""
  return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
