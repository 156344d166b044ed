"""The JSON of requests and responses; OpenAPI's description is made of it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vixml_jax.serving.limits import Limits

_MOST_NUMBERS = 16_384  # Of a feature vector; towers give a tenth of it.


class Label(BaseModel):
  """A label of the index."""

  label: str = Field(description="Its uid.")
  id: int = Field(description="Its row in the index.")
  text: str


class ScoredLabel(Label):
  """A label for a query."""

  score: float = Field(description="Cosine; with retrieval augmentation a share of probability.")


class Answer(BaseModel):
  """The labels of one query, best first."""

  uid: str | None = Field(description="As the query gave it.")
  predictions: list[ScoredLabel]


class Answers(BaseModel):
  """One answer for each query, in their order."""

  answers: list[Answer]


class Health(BaseModel):
  """Whether requests are answered, and by what."""

  status: Literal["starting", "ready"]
  step: int | None = Field(default=None, description="Of the checkpoint.")
  labels: int | None = Field(default=None, description="Those that can be found.")
  search: str | None = None
  retrieval_augmented: bool | None = None
  texts: list[str] | None = Field(default=None, description="Fields of a query that the model reads.")
  images: int | None = Field(default=None, description="The most images of a query that the model looks at.")
  pictures: bool | None = Field(default=None, description="Whether images may be files; if not, feature vectors only.")
  max_k: int | None = None


class Error(BaseModel):
  """What is wrong, and with what."""

  field: str | None = Field(description="Such as queries[3].images[0].")
  message: str


class Failure(BaseModel):
  """The body of every response that is no success."""

  error: Error


class Strict(BaseModel):
  """Takes the declared keys with values of the declared types, and nothing else.

  Other keys are kept for `RequestParser` to refuse: pydantic itself would make an error of each of a million.
  """

  model_config = ConfigDict(extra="allow", strict=True, json_schema_extra={"additionalProperties": False})


def request_model(limits: Limits) -> type[Strict]:
  """The body of `POST /v1/predict`, with the limits in it."""
  text = Annotated[str, Field(max_length=limits.text_chars)]
  names = Annotated[list[text], Field(fail_fast=True, max_length=limits.names)]
  vector = Annotated[list[float], Field(fail_fast=True, max_length=_MOST_NUMBERS)]
  pictures = Annotated[list[str | vector], Field(fail_fast=True, max_length=limits.images)]

  class Query(Strict):
    """One query. Filters replace those of the request."""

    uid: text | None = Field(default=None, description="Comes back with the answer.")
    title: text
    content: text | None = None
    images: pictures | None = Field(
      None, description="PNG, JPEG, WebP, GIF or BMP files in base64, bare or as data: URLs; or feature vectors."
    )
    allow: names | None = Field(default=None, description="Uids of the only labels that it may have.")
    deny: names | None = Field(default=None, description="Uids of labels that it may not have.")
    categories: names | None = Field(default=None, description="The only categories whose labels it may have.")

  class PredictRequest(Strict):
    """Queries, and what holds for all of them."""

    queries: Annotated[list[Query], Field(fail_fast=True, min_length=1, max_length=limits.queries)]
    k: Annotated[int, Field(ge=1, le=limits.k)] = Field(default=10, description="Labels a query.")
    allow: names | None = Field(default=None, description="For queries without an allow of their own.")
    deny: names | None = Field(default=None, description="For queries without a deny of their own.")
    categories: names | None = Field(default=None, description="For queries without categories of their own.")

  return PredictRequest
