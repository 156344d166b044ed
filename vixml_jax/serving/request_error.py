"""Why a request is not answered: a status, the field at fault and what it must be."""

from vixml_jax.serving import schema


class RequestError(Exception):
  """A request that gets an error of HTTP.

  Args:
    status: 4xx for what the client can mend, 503 for what passes.
    message: what is wrong and what to do, in one line.
    field: of the request, such as `queries[3].images[0]`; None where none is at fault.
  """

  def __init__(self, status: int, message: str, field: str | None = None):
    super().__init__(message)
    self.status, self.message, self.field = status, message, field

  @property
  def headers(self) -> dict[str, str]:
    """Of the response."""
    return {"Retry-After": "1"} if self.status == 503 else {}

  @property
  def body(self) -> bytes:
    """JSON of the response."""
    return schema.Failure(error=schema.Error(field=self.field, message=self.message)).model_dump_json().encode()
